"""``peft_type: SHIRA``: sparse high-rank adapters (arXiv:2406.13175, PEFT's ``ShiraConfig``).

Per module ``shira_weight`` (nnz,) and ``shira_indices`` (2, nnz): row (output) and column (input) of each value, int32
(float32 from Windows). The scale is 1. PEFT loads a file only where nnz = r (in + out) in every module, with one r.
The file does not say how large the modules are: our own files do in their metadata, else the base does, else the
config's r where rows and columns reach the ends.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loratools.core.adapter import Adapter, Meta
from loratools.core.lazy import Tensor
from loratools.core.update import Leaf, Update, namespace, shape_of
from loratools.errors import ConversionError, FormatError, LoratoolsError, MismatchError, NeedsBaseError, UsageError
from loratools.formats.metadata import HISTORY, carried, history_of
from loratools.formats.peft.config import base_name, listed
from loratools.formats.peft.extras import explained
from loratools.formats.peft.keys import PREFIX, SAVED, is_original, parameter, parse
from loratools.formats.peft.lora_targets import in_line
from loratools.formats.peft.types import peft_type
from loratools.formats.stored import is_turned
from loratools.io.base import Base
from loratools.io.bundle import Bundle
from loratools.kinds.replace import Replace
from loratools.kinds.sparse import Sparse, coalesced
from loratools.linalg.namespace import all_finite, cast, down, dtype_name, is_float

WEIGHT, INDICES = "shira_weight", "shira_indices"
SHAPES = "loratools.shapes"
_NATIVE = (
    "the native format holds every sparse adapter (shira, fuse: --to native; extract: --format native, or --no-carry)"
)


@peft_type("SHIRA")
class Shira:
    """Reader and writer of sparse adapters."""

    def decode(self, bundle: Bundle, *, base: Base | None = None, allow_unknown: bool = False) -> Adapter:
        """Return the adapter; indices are checked, sorted and, where they repeat, summed, as PEFT does."""
        config = bundle.config or {}
        found = _sorted(bundle.tensors)
        if not found.modules:
            raise FormatError("no sparse values in this file", expected=f"...{WEIGHT} and ...{INDICES}")
        sizes = _Sizes.of(found.modules, bundle, base)
        updates: dict[str, Update] = {}
        for path, parts in found.modules.items():
            try:
                updates[f"{path}.weight"] = _update(parts, sizes, path)
            except LoratoolsError as error:
                raise error.at(parameter=f"{path}.weight") from None
        layout: dict[str, Mapping[str, Any]] = {f"{path}.weight": {"path": path} for path in found.modules}
        remarks = []
        for name, (key, leaf) in found.plain.items():
            if explained(name, key, config, found.modules):
                updates[name] = Replace(leaf)
                layout[name] = {} if SAVED in key else {"key": key}
            elif allow_unknown:
                found.leftover[key] = leaf
                remarks.append(f"{key}: unknown tensor, carried untouched")
            else:
                raise FormatError(
                    "a tensor that the config does not explain",
                    parameter=key,
                    expected="sparse values, their indices, or a module listed in modules_to_save",
                    hint="--allow-unknown carries it through untouched",
                )
        meta = Meta(
            format="peft",
            namespace="hf",
            base_id=base_name(config),
            config=config,
            metadata={k: v for k, v in bundle.metadata.items() if k != HISTORY},
            layout=layout,
            leftover=found.leftover,
            remarks=tuple(remarks),
            history=history_of(bundle.metadata),
            path=bundle.path,
            siblings=bundle.siblings,
            readme=bundle.readme,
        )
        return Adapter(updates, meta)

    def encode(self, adapter: Adapter, *, base: Base | None = None, **options: Any) -> Bundle:
        """Return the bundle. Raises :class:`ConversionError` where PEFT could not load it, naming the module."""
        if options:
            raise UsageError("the PEFT format has no such option", got=", ".join(options))
        r = legal_rank(adapter)
        tensors: dict[str, Tensor] = {}
        shapes: dict[str, list[int]] = {}
        for name, update in adapter.items():
            if isinstance(update, Sparse):
                path = _path(adapter, name)
                tensors |= _tensors(path, update)
                shapes[path] = list(update.shape)
            elif isinstance(update, Replace) and not _is_adapted_bias(adapter, name):
                layout = adapter.meta.layout.get(name, {}) if adapter.meta.source == "peft" else {}
                tensors[layout.get("key") or PREFIX + name] = update.value
            else:
                what = "bias of an adapted module" if isinstance(update, Replace) else f"{update.kind} update"
                raise ConversionError(f"a {what} has no place in a PEFT SHiRA file", parameter=name, hint=_NATIVE)
        meta = adapter.meta
        return Bundle(
            tensors={**tensors, **meta.leftover},
            metadata={"format": "pt", **carried(meta, "peft"), SHAPES: json.dumps(shapes)},
            config=in_line(_config(adapter, r), adapter, dict.fromkeys(shapes, False), ()),
            path=None,
            container="safetensors",
            siblings=meta.siblings,
            readme=meta.readme,
        )


def legal_rank(adapter: Adapter) -> int:
    """Return the one r with nnz = r (in + out) in every sparse module; :class:`ConversionError` where there is none."""
    ranks: dict[int, str] = {}
    for name, u in adapter.items():
        if not isinstance(u, Sparse):
            continue
        if len(u.shape) != 2 or is_turned(adapter, name):
            what = "PEFT's SHiRA knows nn.Linear alone"
            raise ConversionError(what, parameter=name, expected="a weight stored (out, in)", got=u.shape, hint=_NATIVE)
        size = sum(u.shape)
        if u.nnz == 0 or u.nnz % size:
            raise ConversionError(
                "PEFT loads only r (in + out) values per module, with a whole r of at least 1",
                parameter=name,
                expected=f"a multiple of {size}",
                got=u.nnz,
                hint=_NATIVE,
            )
        ranks.setdefault(u.nnz // size, name)
    if len(ranks) != 1:
        got = ", ".join(f"r = {r} in {name}" for r, name in list(ranks.items())[:3]) or "no sparse update"
        raise ConversionError("PEFT's SHiRA has one r for all modules", got=got, hint=_NATIVE)
    return next(iter(ranks))


def _is_adapted_bias(adapter: Adapter, name: str) -> bool:
    module = name.removesuffix(".bias")
    return module != name and isinstance(adapter.get(f"{module}.weight"), Sparse)


@dataclass
class _Found:
    """Tensors by what they are: module path -> leaf name -> tensor; plain parameter -> (key, tensor)."""

    modules: dict[str, dict[str, Leaf]] = field(default_factory=dict)
    plain: dict[str, tuple[str, Leaf]] = field(default_factory=dict)
    leftover: dict[str, Tensor] = field(default_factory=dict)


def _sorted(tensors: Mapping[str, Leaf]) -> _Found:
    found = _Found()
    for key, leaf in tensors.items():
        said = parse(key)
        kind, dot, _ = said.leaf.partition(".")
        if kind in (WEIGHT, INDICES):
            parts = found.modules.setdefault(said.path, {})
            if kind in parts:
                raise FormatError(
                    "a module's sparse values are stored twice", parameter=key, got=said.leaf if dot else key
                )
            parts[kind] = leaf
        elif is_original(said.path):
            found.leftover[key] = leaf
        elif said.leaf:
            raise FormatError("a tensor of another type in a SHiRA file", parameter=key, got=said.leaf)
        else:
            found.plain[parameter(said.path)[0]] = (key, leaf)
    return found


@dataclass(frozen=True)
class _Sizes:
    """What tells how large modules are: the base's shapes, the file's own list, or r."""

    base: Mapping[str, tuple[int, ...]]
    said: Mapping[str, Any]
    r: int | None

    @classmethod
    def of(cls, paths: Mapping[str, Any], bundle: Bundle, base: Base | None) -> _Sizes:
        names = {} if base is None else base.resolve([f"{path}.weight" for path in paths])
        shapes = {n.removesuffix(".weight"): base.shapes[t] for n, t in names.items()} if base is not None else {}
        r = (bundle.config or {}).get("r")
        return cls(shapes, _said_shapes(bundle), r if isinstance(r, int) and r > 0 else None)

    def shape(self, path: str, nnz: int, reach: tuple[int, int]) -> tuple[int, int]:
        """Return (out, in) of a module with ``nnz`` values whose indices reach so far."""
        base, said = self.base.get(path), self.said.get(path)
        if base is not None:
            if len(base) != 2:
                raise MismatchError("the adapter does not fit the base", expected="a matrix", got=base)
            return base[0], base[1]
        if said is not None:
            return said[0], said[1]
        if self.r is not None and nnz == self.r * sum(reach):
            return reach
        raise NeedsBaseError(
            "the file does not say how large this module is, and its indices do not reach the ends", hint="pass --base"
        )


def _said_shapes(bundle: Bundle) -> dict[str, Any]:
    try:
        said = json.loads(bundle.metadata.get(SHAPES, "{}"))
        shapes = {path: tuple(map(int, shape)) for path, shape in said.items()}
        if not all(len(shape) == 2 and min(shape) > 0 for shape in shapes.values()):
            raise ValueError
    except (ValueError, TypeError, AttributeError):
        raise FormatError(f"{SHAPES} in the metadata cannot be read", got=bundle.metadata[SHAPES][:80]) from None
    return shapes


def _update(parts: Mapping[str, Leaf], sizes: _Sizes, path: str) -> Sparse:
    missing = {WEIGHT, INDICES} - parts.keys()
    if missing:
        raise FormatError("half of a sparse module is missing", expected=missing.pop())
    values, index = (parts[kind].read() for kind in (WEIGHT, INDICES))
    if len(shape_of(values)) != 1 or shape_of(index) != (2, shape_of(values)[0]) or not shape_of(values)[0]:
        got = f"{WEIGHT} {shape_of(values)}, {INDICES} {shape_of(index)}"
        raise FormatError("values and indices of a sparse module do not fit", expected="(n,) and (2, n)", got=got)
    if not is_float(dtype_name(values)):
        raise FormatError("sparse values of no floating type", got=dtype_name(values))
    whole = _whole_numbers(index)
    xp = namespace(whole)
    reach = int(xp.max(whole[0, :])) + 1, int(xp.max(whole[1, :])) + 1
    return coalesced(whole[0, :], whole[1, :], values, sizes.shape(path, values.shape[0], reach))


def _whole_numbers(index: Any) -> Any:
    """Return the indices as int64; PEFT stores them as float32 on Windows."""
    whole = cast(index, "int64") if all_finite(index) else None
    if whole is None or (is_float(dtype_name(index)) and not bool((cast(whole, "float64") == index).all())):
        raise FormatError("indices of a sparse module are no whole numbers")
    return whole


def _path(adapter: Adapter, name: str) -> str:
    layout = adapter.meta.layout.get(name, {}) if adapter.meta.source == "peft" else {}
    if "path" in layout:
        return str(layout["path"])
    if not name.endswith(".weight"):
        raise ConversionError("PEFT adapts the weights of modules: this parameter is none", parameter=name)
    return name.removesuffix(".weight")


def _tensors(path: str, u: Sparse) -> dict[str, Tensor]:
    row, column = u.places()
    xp = namespace(row)
    values = u.values if u.scale == 1.0 else down(u.numbers(), dtype_name(u.values))
    return {
        f"{PREFIX}{path}.{WEIGHT}": values,
        f"{PREFIX}{path}.{INDICES}": cast(xp.stack([row, column], axis=0), "int32"),
    }


def _config(adapter: Adapter, r: int) -> dict[str, Any]:
    """Return the sidecar: a SHiRA source's own with the new r, else a fresh one."""
    source = adapter.meta.config if adapter.meta.source == "peft" else {}
    if str(source.get("peft_type")).upper() == "SHIRA":
        return {**source, "r": r}
    return {
        "base_model_name_or_path": adapter.meta.base_id,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_weights": True,
        "mask_type": "stored",  # PEFT draws no mask of its own: the indices come from the file
        "modules_to_save": list(listed(source, "modules_to_save")) or None,
        "peft_type": "SHIRA",
        "r": r,
        "random_seed": None,
        "target_modules": [],
        "task_type": source.get("task_type"),
    }
