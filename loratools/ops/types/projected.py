"""What types with a closed-form projection share: every matrix of an adapter as the nearest one that a type can say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

from loratools.core.adapter import Absorbed, Adapter
from loratools.core.generic import need_delta
from loratools.core.update import Array, Leaf, Update, working_dtype
from loratools.errors import ConversionError
from loratools.files import BaseLike
from loratools.formats.peft.common_config import common
from loratools.formats.peft.keys import PREFIX
from loratools.formats.peft.types import PEFT_TYPES
from loratools.formats.spaces import ready
from loratools.formats.stored import is_turned
from loratools.io.base import Base
from loratools.io.bundle import from_memory
from loratools.kinds.lowrank import LowRank, low_rank
from loratools.linalg.namespace import to_numpy, up
from loratools.ops.fold import square
from loratools.ops.types.walk import finished, is_layer, walk

Tensors = Mapping[str, Array]  # leaf -> tensor of one module; a leaf of the whole model starts with MODEL
Project = Callable[[str, Array], Tensors]
MODEL = "base_model."


@dataclass(frozen=True)
class Type:
    """A type of PEFT: its name, the fields of its config, and whether it knows weights stored (in, out)."""

    name: str
    fields: Mapping[str, Any]
    conv1d: bool = False


def shapes_of(adapter: Adapter) -> dict[str, tuple[int, int]]:
    """Return (out, in) of every weight of a layer, by name; ConversionError for what no projection is defined for."""
    found: dict[str, tuple[int, int]] = {}
    for name, u in adapter.items():
        if not is_layer(u):
            continue  # carried
        if len(u.shape) != 2 or not name.endswith(".weight"):
            what = f"only changes of linear layers can be projected: this {u.kind} update is none"
            raise ConversionError(what, parameter=name, got=u.shape, hint="--type lora says it")
        found[name] = (u.shape[1], u.shape[0]) if is_turned(adapter, name) else (u.shape[0], u.shape[1])
    return found


def named(adapter: Adapter) -> Adapter:
    """Return the adapter under the names that PEFT gives parameters."""
    return ready(adapter, "hf", format="peft")


def projected(adapter: Adapter, base: BaseLike | None, to: Type, project: Project) -> Adapter:
    """Return the adapter as type ``to``: ``project(name, D)`` gives the tensors for a difference D (out, in), formed.

    What they say is what the reader of the type reads from them; its distance from D is in the report. What is no
    weight of a layer is carried; changes of biases have no place in these types, and their writer says so.
    """
    shapes = shapes_of(adapter)
    absorbed: dict[str, Absorbed] = {}

    def one(name: str, u: Update, w: Leaf | Array | None) -> tuple[Update, dict[str, Any]]:
        turned = is_turned(adapter, name)
        if turned and not to.conv1d:
            raise ConversionError(f"PEFT's {to.name} knows nn.Linear alone", expected="a weight stored (out, in)")
        delta = u.delta(up(w, working_dtype(w)) if w is not None else None)
        d = delta.dense().T if turned else delta.dense()
        tensors = {_key(name, leaf): to_numpy(t) for leaf, t in project(name, d).items()}
        new = _read(name, tensors, to, adapter[name].shape)
        absorbed[name] = Absorbed(new, from_memory(tensors).tensors)
        total = square(delta.dense())
        lost = square(need_delta(new).dense() - delta.dense())
        flat = low_rank(delta)
        row = {
            "name": name,
            "rank_before": None if flat is None else flat.rank,
            "rank_after": new.rank if isinstance(new, LowRank) else None,
            "relative_error": sqrt(lost / total) if total else 0.0,
            "update_norm": sqrt(total),
        }
        return new, row

    done, rows = walk(adapter, base, lambda u: True, lambda u: not hasattr(u, "matmul"), one)
    meta = adapter.meta
    said: dict[str, Any] = {"base_model_name_or_path": meta.base_id}
    config = common(meta.config) if meta.source == "peft" else said
    config |= {**to.fields, "peft_type": to.name, "inference_mode": True, "bias": "none"}
    config["target_modules"] = sorted(name.removesuffix(".weight") for name in shapes)
    layout = {name: _placed(meta.layout.get(name, {}), name) for name in adapter}
    meta = replace(meta, config=config, origin="peft", layout=layout, absorbed=absorbed, leftover={})
    return finished(replace(done, meta=meta), adapter, rows, to.name.lower())


def _key(name: str, leaf: str) -> str:
    return leaf if leaf.startswith(MODEL) else f"{PREFIX}{name.removesuffix('.weight')}.{leaf}"


def _placed(layout: Mapping[str, Any], name: str) -> dict[str, Any]:
    kept = {key: layout[key] for key in ("stored", "key") if key in layout}
    return {**kept, "path": name.rpartition(".")[0]}


def _read(name: str, tensors: Mapping[str, Array], to: Type, shape: tuple[int, ...]) -> Update:
    """Return what the type's own reader makes of the tensors of one module; the base is there in name and shape."""
    hollow = Base({name: Leaf(shape, "float32", lambda out: out)})
    return PEFT_TYPES[to.name].decode(from_memory(tensors, dict(to.fields)), base=hollow)[name]
