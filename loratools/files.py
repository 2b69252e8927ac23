"""From path to Adapter and back: container, format and output rules joined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from loratools.core.adapter import Adapter
from loratools.core.update import Array, Update, is_tensor
from loratools.errors import LoratoolsError, UsageError
from loratools.formats.base import FORMATS
from loratools.formats.detect import detect
from loratools.formats.floats import need_floats
from loratools.io.base import Base
from loratools.io.bundle import Bundle, from_memory
from loratools.io.directory import nested
from loratools.io.read import open_bundle
from loratools.linalg.namespace import down, dtype_name, is_float, up
from loratools.outputs import file_bytes, put, readme_text

BaseLike = Base | str | Path | Mapping[str, Array]


def load(
    path: str | Path,
    *,
    format: str | None = None,
    base: BaseLike | None = None,
    allow_unknown: bool = False,
    expert_order: str | None = None,
) -> Adapter:
    """Read an adapter file or directory of any readable format; tensors are read when used.

    ``base`` (a path or a mapping name -> array) settles names and orientations where the file alone cannot.
    ``allow_unknown`` carries tensors that no rule explains instead of refusing them. ``expert_order`` (``rank-major``,
    ``expert-major``) is how a PEFT file packs experts, where the file does not tell.
    """
    bundle = hinted(open_bundle(path), expert_order, folder=Path(path))
    return decode(bundle, format=format, base=base, allow_unknown=allow_unknown)


def from_state_dict(
    tensors: Mapping[str, Array],
    config: Mapping[str, Any] | None = None,
    *,
    format: str | None = None,
    base: BaseLike | None = None,
    allow_unknown: bool = False,
    expert_order: str | None = None,
) -> Adapter:
    """Return the adapter held in memory as a state dict of NumPy or torch tensors, with its config; as :func:`load`."""
    bundle = hinted(from_memory(tensors, config=config), expert_order)
    return decode(bundle, format=format, base=base, allow_unknown=allow_unknown)


def hinted(bundle: Bundle, expert_order: str | None, folder: Path | None = None) -> Bundle:
    """Return the bundle with what is known beyond its tensors: the caller's word, its README, its subfolders."""
    hints = {} if expert_order is None else {"expert_order": expert_order}
    if folder is not None and folder.is_dir() and (others := nested(folder)):
        hints["others"] = ", ".join(others)
    if bundle.readme is not None and (bundle.config or {}).get("target_parameters"):
        hints["readme"] = readme_text(bundle.readme)
    return replace(bundle, hints=hints) if hints else bundle


def decode(
    bundle: Bundle, *, format: str | None = None, base: BaseLike | None = None, allow_unknown: bool = False
) -> Adapter:
    """Hand a bundle to its format; errors name the file."""
    try:
        chosen = FORMATS[format] if format else detect(bundle)
        return need_floats(chosen.decode(bundle, base=open_base(base), allow_unknown=allow_unknown))
    except LoratoolsError as error:
        raise error.at(file=bundle.path) from error


def open_base(base: BaseLike | None) -> Base | None:
    """Return a :class:`Base` for a path, a mapping or a Base."""
    return base if base is None or isinstance(base, Base) else Base.open(base)


def save(
    adapter: Adapter,
    path: str | Path,
    *,
    format: str | None = None,
    base: BaseLike | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Write an adapter, atomically, and return where it is.

    The format is the source's own unless given. A PEFT adapter becomes a directory with everything that belongs to it,
    unless ``path`` ends in ``.safetensors``: then its config is written beside it. ``dtype`` converts every tensor.
    """
    adapter, bundle = _encoded(adapter, format, base, dtype, options)
    put(adapter, bundle, Path(path), overwrite=overwrite)
    return Path(path)


def rehearse(
    adapter: Adapter,
    *,
    format: str | None = None,
    base: BaseLike | None = None,
    dtype: str | None = None,
    **options: Any,
) -> int:
    """Return the bytes of the weights file that :func:`save` would write; raise what its writer would raise."""
    return file_bytes(_encoded(adapter, format, base, dtype, options)[1])


def _encoded(
    adapter: Adapter, format: str | None, base: BaseLike | None, dtype: str | None, options: Mapping[str, Any]
) -> tuple[Adapter, Bundle]:
    """Return the adapter in the storage dtype, and as its format writes it."""
    if dtype is not None:
        if not is_float(dtype):
            raise UsageError("no floating dtype to store tensors in", expected="float16, bfloat16, ...", got=dtype)
        adapter = adapter.map(lambda _, u: cast(u, dtype))
    return adapter, FORMATS[format or adapter.meta.format].encode(adapter, base=open_base(base), **options)


def written_size(adapter: Adapter, *, format: str | None = None, base: BaseLike | None = None) -> int:
    """Return the bytes of the weights file that :func:`save` would write, from names, shapes and dtypes alone."""
    return file_bytes(FORMATS[format or adapter.meta.format].encode(adapter, base=open_base(base)))


def cast(update: Any, dtype: str) -> Any:
    """Return an update with every floating tensor stored as ``dtype``."""

    def one(value: Any) -> Any:
        if isinstance(value, Update):
            return cast(value, dtype)
        if isinstance(value, tuple) and value and isinstance(value[0], Update):
            return tuple(cast(part, dtype) for part in value)
        if is_tensor(value) and is_float(dtype_name(value)) and dtype_name(value) != dtype:
            return down(up(value, "float64" if dtype_name(value) == "float64" else "float32"), dtype)
        return value

    return replace(update, **{f.name: one(getattr(update, f.name)) for f in fields(update)})
