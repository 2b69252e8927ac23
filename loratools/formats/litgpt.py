"""litgpt's ``lit_model.pth.lora``: ``transformer.h.N.attn.qkv.lora_A`` (parts r, in), ``.lora_B`` (rows, r) and kin.

The fused projection stacks its enabled parts (q, k, v); head counts come from the base's config.json. The scale is in
hyperparameters.yaml, not in the file. docs/formats/litgpt.md
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from loratools.core.adapter import Adapter
from loratools.core.update import Leaf, Update
from loratools.errors import ConversionError, FormatError, NameUnresolvedError, NeedsBaseError, UnsupportedError
from loratools.formats.base import FORMATS, Format
from loratools.formats.blocks import baked, rows_of
from loratools.formats.metadata import carried, with_hashes
from loratools.formats.modules import Found, check_kinds, refuse_options
from loratools.formats.pairs import Parts, Tensor, grouped, low_rank_of, require
from loratools.formats.spaces import ready
from loratools.formats.stored import as_linear
from loratools.formats.trees import heads_of
from loratools.io.base import Base
from loratools.io.bundle import Bundle
from loratools.kinds.lowrank import LowRank
from loratools.linalg.namespace import namespace, to_numpy

_ROLES = {"lora_A": "a", "lora_B": "b"}
_FUSED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_MODULES = {
    "attn.proj": "self_attn.o_proj", "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}  # fmt: skip
_BACK = {new: old for old, new in _MODULES.items()}


class Litgpt(Format):
    """LoRA of litgpt on Llama-like models (q, k and v all enabled, or q alone)."""

    name = "litgpt"
    accepts: ClassVar[tuple[type[Update], ...]] = (LowRank,)

    def declines(self, bundle: Bundle) -> str | None:
        """Claim litgpt's fused projection."""
        fused = any(re.match(r"transformer\.h\.\d+\.attn\.qkv\.lora_A$", key) for key in bundle.tensors)
        return None if fused else "no transformer.h.N.attn.qkv.lora_A among the keys"

    def decode(self, bundle: Bundle, *, base: Base | None = None, allow_unknown: bool = False) -> Adapter:
        """Split the fused projections exactly; needs the base's head counts."""
        heads = None if base is None else heads_of(base.config)
        if heads is None:
            raise NeedsBaseError(
                "litgpt's fused projections need the numbers of heads", hint="--base MODEL (its config.json)"
            )
        modules, rest = grouped(bundle.tensors, _ROLES)
        found = Found()
        for stem, parts in modules.items():
            for module, u in _read(stem, parts, heads.query, heads.key).items():
                found.add(f"{module}.weight", u, parts)
        found.rest(rest, allow_unknown=allow_unknown)
        found.remarks.append(
            "the scale (lora_alpha / lora_r) is in hyperparameters.yaml, not in the file: 1 stands for it"
        )
        return found.adapter(bundle, self.name, base, scaled=False, namespace="hf")

    def encode(self, adapter: Adapter, *, base: Base | None = None, **options: Any) -> Bundle:
        """Write fused projections of one rank per block; scales are in ``lora_B`` (load with lora_alpha = lora_r)."""
        refuse_options(self.name, options)
        check_kinds(adapter, self.accepts, self.name)
        spoken = ready(adapter, "hf", format=self.name)
        blocks: dict[str, dict[int, LowRank]] = {}  # stem -> parts of the fused projection, or the one module as part 0
        for name in spoken:
            stem, part = _place(name)
            blocks.setdefault(stem, {})[part] = baked(low_rank_of(name, as_linear(spoken, name))[0])
        tensors = {key: t for stem, parts in blocks.items() for key, t in _fuse(stem, parts).items()}
        leftover = dict(adapter.meta.leftover) if adapter.meta.source == self.name else {}
        return Bundle(
            tensors | leftover, with_hashes(carried(adapter.meta, self.name), tensors), container="safetensors"
        )


def _read(stem: str, parts: Parts, queries: int, keys: int) -> dict[str, LowRank]:
    a, b = require(parts, stem, "a", "b")
    found = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", stem)
    if stem == "lm_head":
        return {"lm_head": LowRank(b, a)}
    if not found or (found[2] not in _MODULES and found[2] != "attn.qkv"):
        raise NameUnresolvedError("no table says what Hugging Face calls this module", parameter=stem)
    home = f"model.layers.{found[1]}."
    if found[2] in _MODULES:
        return {home + _MODULES[found[2]]: LowRank(b, a)}
    return {home + part: u for part, u in _split(stem, a, b, queries, keys).items()}


def _split(stem: str, a: Leaf, b: Leaf, queries: int, keys: int) -> dict[str, LowRank]:
    rank = b.shape[1]
    enabled, odd = divmod(a.shape[0], rank)
    width, rest = divmod(b.shape[0], {3: queries + 2 * keys, 1: queries}.get(enabled, 1))
    if odd or rest:
        raise FormatError("the fused factors do not fit the heads", parameter=stem, got=f"{a.shape}, {b.shape}")
    if enabled not in (1, 3) or (enabled == 1 and queries == keys):
        raise UnsupportedError("which of q, k, v are enabled is not in the file", parameter=stem, got=f"{enabled} of 3")
    names, at = (_FUSED if enabled == 3 else _FUSED[:1]), 0
    done: dict[str, LowRank] = {}
    for i, name in enumerate(names):
        rows = width * (keys if i else queries)
        done[name] = LowRank(rows_of(b, slice(at, at + rows)), rows_of(a, slice(i * rank, (i + 1) * rank)))
        at += rows
    return done


def _place(name: str) -> tuple[str, int]:
    """Return litgpt's module, and which part of it a parameter is."""
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    if name == "lm_head.weight":
        return "lm_head", 0
    if found is None or found[2] not in (*_BACK, *_FUSED):
        raise NameUnresolvedError("litgpt's model has no such module", parameter=name)
    if found[2] in _FUSED:
        return f"transformer.h.{found[1]}.attn.qkv", _FUSED.index(found[2])
    return f"transformer.h.{found[1]}.{_BACK[found[2]]}", 0


def _fuse(stem: str, parts: Mapping[int, LowRank]) -> dict[str, Tensor]:
    """Return the tensors of one module; q, k and v of one rank are stacked."""
    if len(parts) == 1 and 0 in parts:
        return {f"{stem}.lora_A": parts[0].a, f"{stem}.lora_B": parts[0].b}
    ranks = sorted({u.rank for u in parts.values()})
    if set(parts) != {0, 1, 2} or len(ranks) > 1:
        got = f"{len(parts)} parts of ranks {ranks}"
        raise ConversionError("litgpt's fused projection wants q, k and v of one rank", parameter=stem, got=got)
    ordered = [parts[i] for i in range(3)]
    b, a = [to_numpy(u.b) for u in ordered], [to_numpy(u.a) for u in ordered]
    xp = namespace(b[0])
    return {f"{stem}.lora_A": xp.concat(a, axis=0), f"{stem}.lora_B": xp.concat(b, axis=0)}


FORMATS.add("litgpt")(Litgpt())
