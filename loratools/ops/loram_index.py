"""Which rows and columns pruning kept: our JSON index, or the directory of ``pruned_idx`` files that LoRAM writes.

JSON: ``{"parameters": {NAME: {"shape": [m, n], "kept_rows": [...], "kept_columns": [...]}}}``; ``dropped_rows`` and
``dropped_columns`` may stand for the kept ones; what is not named was not pruned; ``shape`` may be left to the base.

LoRAM: ``model.layers.I.mlp.gate_proj.pt`` and ``model.layers.I.self_attn.k_proj.pt`` with the *dropped* indices of the
feed-forward channels, and of the rows of k_proj in whole heads; queries and outputs lose the heads that share them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loratools.core.adapter import Adapter
from loratools.errors import FormatError, MismatchError, NeedsBaseError
from loratools.io.base import Base
from loratools.io.read import open_bundle, read_json
from loratools.ops.loram import Kept


def read_index(path: str | Path, adapter: Adapter, base: Base | None) -> dict[str, Kept]:
    """Return parameter name -> what was kept, for the parameters of ``adapter`` that the index names.

    Raises FormatError for an index that makes no sense, NeedsBaseError where shapes or head counts are missing.
    """
    source = Path(path)
    said = _loram(source, base) if source.is_dir() else _json(source)
    names = {} if base is None else base.resolve(adapter, optional=set(adapter))
    found: dict[str, Kept] = {}
    for name in adapter:
        key = next((k for k in (name, names.get(name), name.removesuffix(".weight")) if k in said), None)
        if key is not None:
            full = base.shapes.get(names.get(name, name)) if base is not None else None
            found[name] = _kept(key, said[key], full)
    return found


def _json(path: Path) -> dict[str, Mapping[str, Any]]:
    table = read_json(path).get("parameters")
    if not isinstance(table, dict) or not all(isinstance(v, dict) for v in table.values()):
        raise FormatError("the index has no table of parameters", file=path, expected='{"parameters": {NAME: {...}}}')
    return table


def _loram(folder: Path, base: Base | None) -> dict[str, Mapping[str, Any]]:
    if base is None:
        raise NeedsBaseError("LoRAM's files do not tell the full shapes", hint="pass --base with the full model")
    found: dict[str, Mapping[str, Any]] = {}
    for file in sorted(folder.glob("*.pt")):
        module = file.stem.removesuffix(".mlp.gate_proj").removesuffix(".self_attn.k_proj")
        dropped = _pruned(file)
        if file.stem.endswith(".mlp.gate_proj"):
            found |= {f"{module}.mlp.{p}.weight": {"dropped_rows": dropped} for p in ("gate_proj", "up_proj")}
            found[f"{module}.mlp.down_proj.weight"] = {"dropped_columns": dropped}
        elif file.stem.endswith(".self_attn.k_proj"):
            heads = _query_rows(dropped, base, file)
            found |= {f"{module}.self_attn.{p}.weight": {"dropped_rows": dropped} for p in ("k_proj", "v_proj")}
            found[f"{module}.self_attn.q_proj.weight"] = {"dropped_rows": heads}
            found[f"{module}.self_attn.o_proj.weight"] = {"dropped_columns": heads}
    if not found:
        raise FormatError("no pruned_idx files in the directory", file=folder, expected="*.mlp.gate_proj.pt")
    return found


def _pruned(file: Path) -> list[int]:
    tensors = open_bundle(file).tensors
    if "pruned_idx" not in tensors:
        raise FormatError("no pruned_idx in the file", file=file, got=", ".join(list(tensors)[:3]))
    return [int(i) for i in tensors["pruned_idx"].read().reshape(-1).tolist()]


def _query_rows(dropped: Iterable[int], base: Base, file: Path) -> list[int]:
    """Return the rows of q_proj (columns of o_proj) that go with dropped rows of k_proj: every head of its group."""
    config = base.config.get("text_config") or base.config
    heads = config.get("num_attention_heads")
    if not isinstance(heads, int):
        raise NeedsBaseError("the base's config.json does not say num_attention_heads", hint="pass the full model")
    groups = heads // int(config.get("num_key_value_heads") or heads)
    size = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    kv = sorted({i // size for i in dropped})
    if sorted(dropped) != [h * size + i for h in kv for i in range(size)]:
        raise FormatError("the dropped rows are no whole heads", file=file, expected=f"heads of {size} rows")
    return [(h * groups + g) * size + i for h in kv for g in range(groups) for i in range(size)]


def _kept(name: str, said: Mapping[str, Any], full: tuple[int, ...] | None) -> Kept:
    shape = tuple(said.get("shape") or full or ())
    if len(shape) != 2 or (full is not None and shape != full):
        raise (NeedsBaseError if not shape else MismatchError)(
            "the full shape of a parameter is not known, or not the base's", parameter=name, expected=full,
            got=shape or None, hint="pass --base with the full model",
        )  # fmt: skip
    rows, columns = (_axis(name, said, axis, size) for axis, size in zip(("rows", "columns"), shape, strict=True))
    return Kept((int(shape[0]), int(shape[1])), rows, columns)


def _axis(name: str, said: Mapping[str, Any], axis: str, size: int) -> tuple[int, ...] | None:
    kept, dropped = said.get(f"kept_{axis}"), said.get(f"dropped_{axis}")
    if kept is None and dropped is None:
        return None
    given = kept if kept is not None else dropped
    if not isinstance(given, list) or not all(isinstance(i, int) and 0 <= i < size for i in given):
        raise FormatError(f"the {axis} of an index are no indices", parameter=name, expected=f"0 to {size - 1}")
    if len(set(given)) < len(given):
        raise FormatError(f"the {axis} of an index repeat", parameter=name)
    inside = set(given)
    return tuple(sorted(inside)) if kept is not None else tuple(i for i in range(size) if i not in inside)
