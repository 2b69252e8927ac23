"""Factors are real numbers: integers in their place are a quantised or a damaged file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from loratools.core.adapter import Adapter
from loratools.core.update import Leaf, Update, is_tensor
from loratools.errors import FormatError
from loratools.leaf import Array
from loratools.linalg.namespace import dtype_name, is_float

WHOLE = {
    "replace": ("value",),
    "replace_rows": ("rows",),
    "rebased": ("value",),
    "sparse": ("rows", "columns", "base"),
    "packed": ("codes",),
    "binary": ("b", "a"),
    "fourier": ("rows", "columns"),
    "wavelet": ("rows", "columns"),
}
"""Fields by kind that hold values of the base or an index, which may be of any dtype."""


def need_floats(adapter: Adapter) -> Adapter:
    """Return the adapter; raise :class:`FormatError` for a factor of no floating dtype, from dtypes alone."""
    for name, update in adapter.items():
        for field, t in _factors(update):
            if not is_float(dtype_name(t)):
                raise FormatError(
                    "a factor is not of a floating dtype",
                    parameter=name,
                    expected="fp32, fp16, bf16, ...",
                    got=f"{field} of {dtype_name(t)}",
                    hint="the file is quantised or damaged: fetch it in a floating dtype",
                )
    return adapter


def _factors(update: Update) -> Iterator[tuple[str, Leaf | Array]]:
    """Yield (field, tensor) of an update and of those inside it, but for values of the base."""
    for f in fields(update):  # type: ignore[arg-type]  # every kind is a dataclass
        value = getattr(update, f.name)
        inner = [u for u in (value if isinstance(value, tuple) else (value,)) if isinstance(u, Update)]
        yield from ((f"{f.name}.{field}", t) for u in inner for field, t in _factors(u))
        if is_tensor(value) and f.name not in WHOLE.get(update.kind, ()):
            yield f.name, value
