"""llama.cpp's GGUF adapters: ``<tensor>.weight.lora_a`` (r, in), ``.lora_b`` (out, r), one alpha. docs/formats/gguf.md

Scale: alpha / rank of the tensor, one alpha for the file; alpha 0 means scale 1. q and k of Llama-family models are
stored in another row order; what llama.cpp cannot apply (magnitudes, biases, whole modules, convolutions) is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from loratools.core.adapter import Adapter
from loratools.core.update import Update
from loratools.errors import ConversionError, FormatError, NameUnresolvedError, NeedsBaseError, UnsupportedError
from loratools.formats.base import FORMATS, Format
from loratools.formats.blocks import baked, taken
from loratools.formats.modules import Found, check_kinds, refuse_options
from loratools.formats.pairs import Parts, Tensor, grouped, low_rank_of, require
from loratools.formats.spaces import ready
from loratools.formats.stored import as_linear
from loratools.formats.trees import (
    GGUF,
    Heads,
    Tree,
    from_theirs,
    heads_of,
    interleaving,
    inverse,
    is_rotary,
    to_theirs,
    tree_of,
    tree_of_arch,
)
from loratools.io.base import Base
from loratools.io.bundle import Bundle
from loratools.io.gguf import DEQUANTISED, TYPES
from loratools.kinds.lowrank import LowRank

_ROLES = {"lora_a": "a", "lora_b": "b"}
ALPHA = "adapter.lora.alpha"
ARCH = "general.architecture"
TOKENS = "adapter.alora.invocation_tokens"


class Gguf(Format):
    """LoRA files of llama.cpp, Ollama and kin."""

    name = "gguf"
    accepts: ClassVar[tuple[type[Update], ...]] = (LowRank,)

    def declines(self, bundle: Bundle) -> str | None:
        """Claim GGUF containers that say they are LoRA adapters."""
        if bundle.container != "gguf" and ARCH not in bundle.metadata:
            return "no GGUF container"
        said = bundle.metadata.get("general.type"), bundle.metadata.get("adapter.type")
        return None if said == ("adapter", "lora") else f"a GGUF {said[0] or 'model'}, not a LoRA adapter"

    def decode(self, bundle: Bundle, *, base: Base | None = None, allow_unknown: bool = False) -> Adapter:
        """Read every tensor pair; names become the model's own where architecture (and head counts) are known."""
        modules, rest = grouped(bundle.tensors, _ROLES)
        tree = tree_of_arch(bundle.metadata.get(ARCH, ""))
        alpha = _alpha(bundle.metadata)
        heads = None if base is None else heads_of(base.config)
        named = tree is not None and (heads is not None or not _needs_heads(tree, modules))
        found = Found()
        for stem, parts in modules.items():
            u = _update(stem, parts, alpha)
            path = from_theirs(tree, stem.removesuffix(".weight")) if tree is not None and named else None
            order = interleaving(tree, stem.removesuffix(".weight"), u.shape[0], heads) if tree and path else None
            done = u if order is None else taken(u, inverse(order))
            more = {} if order is None else {"heads": [heads.query, heads.key]} if heads else {}
            found.add(stem if path is None else f"{path}.weight", done, parts, stem=stem, **more)
        found.rest(rest, allow_unknown=allow_unknown)
        if not named:
            found.remarks.append("names stay llama.cpp's: --base MODEL gives the head counts that q and k need")
        for key in json.loads(bundle.metadata.get(DEQUANTISED, "[]"))[:1]:
            found.remarks.append(f"quantised tensors are read as fp32: {key}")
        return found.adapter(bundle, self.name, base if named else None, namespace="hf" if named else "gguf")

    def encode(
        self,
        adapter: Adapter,
        *,
        base: Base | None = None,
        model_type: str = "",
        heads: int = 0,
        kv_heads: int = 0,
        **options: Any,
    ) -> Bundle:
        """Write pairs in llama.cpp's names and row order.

        The base's config.json says ``model_type``, ``heads`` and ``kv_heads``; each may be given instead.
        """
        refuse_options(self.name, options)
        check_kinds(adapter, self.accepts, self.name)
        own = adapter.meta.source == self.name
        spoken = ready(adapter, "hf", format=self.name)
        config = {} if base is None else base.config
        tree = _tree(adapter, config, model_type)
        counts = Heads(heads, kv_heads or heads) if heads else heads_of(config)
        pairs = {name: low_rank_of(name, as_linear(spoken, name))[0] for name in spoken}
        alpha, pairs = _one_alpha(adapter, pairs)
        tensors: dict[str, Tensor] = {}
        for name, u in pairs.items():
            said = adapter.meta.layout.get(name, {}) if own else {}
            tensors |= _tensors(tree, name, u, said, counts, config)
        metadata = _metadata(adapter, tree.arch if tree else adapter.meta.metadata[ARCH], alpha)
        return Bundle(tensors | (dict(adapter.meta.leftover) if own else {}), metadata, container="gguf")


def _needs_heads(tree: Tree, stems: Mapping[str, Any]) -> bool:
    return any(is_rotary(tree, stem.removesuffix(".weight")) for stem in stems)


def _alpha(metadata: Mapping[str, str]) -> float:
    try:
        alpha = float(metadata.get(ALPHA, "0"))
    except ValueError:
        alpha = math.nan
    if not math.isfinite(alpha):
        raise FormatError(f"{ALPHA} is no number", got=metadata.get(ALPHA))
    return alpha


def _update(stem: str, parts: Parts, alpha: float) -> LowRank:
    a, b = require(parts, stem, "a", "b")
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise UnsupportedError("stacked experts: not read by this version", parameter=stem, got=f"{a.shape}, {b.shape}")
    embedding = stem == "token_embd.weight"
    rank = a.shape[1] if embedding else a.shape[0]
    if rank != b.shape[1]:
        raise FormatError("the factors do not multiply", parameter=stem, got=f"{a.shape}, {b.shape}")
    scale = alpha / rank if alpha else 1.0
    return LowRank(a, b.T, scale) if embedding else LowRank(b, a, scale)


def _tree(adapter: Adapter, config: Mapping[str, Any], model_type: str) -> Tree | None:
    said = model_type or config.get("text_config", config).get("model_type")
    if said:
        return tree_of(GGUF, said, "llama.cpp")
    if adapter.meta.source == "gguf":
        return tree_of_arch(adapter.meta.metadata.get(ARCH, ""))
    raise NeedsBaseError(
        "GGUF names and row orders depend on the model",
        hint="--base MODEL (its config.json), or --set model_type=llama --set heads=N --set kv_heads=N",
    )


def _one_alpha(adapter: Adapter, pairs: Mapping[str, LowRank]) -> tuple[float, dict[str, LowRank]]:
    """Return the alpha of the file, and the pairs as it scales them: where no one alpha fits, 0 and scales in ``b``."""
    if adapter.meta.source == "gguf":
        stored = _alpha(adapter.meta.metadata)
        if all(u.scale == (stored / u.rank if stored else 1.0) for u in pairs.values()):
            return stored, dict(pairs)
    alphas = {u.scale * u.rank for u in pairs.values()}
    if len(alphas) == 1 and 0.0 not in alphas:
        return alphas.pop(), dict(pairs)
    return 0.0, {name: baked(u) for name, u in pairs.items()}


def _tensors(
    tree: Tree | None, name: str, u: LowRank, said: Mapping[str, Any], heads: Heads | None, config: Mapping[str, Any]
) -> dict[str, Tensor]:
    if len(u.shape) != 2:
        raise ConversionError("llama.cpp adapts matrices only", parameter=name, got=u.shape)
    module = name.removesuffix(".weight")
    stem = said.get("stem", "").removesuffix(".weight") or (None if tree is None else to_theirs(tree, module))
    if not stem:
        raise NameUnresolvedError("llama.cpp's file of this model has no such tensor", parameter=name)
    if stem == "output" and config.get("tie_word_embeddings"):
        raise ConversionError(
            "the base ties its output to its embedding: its GGUF file has no output.weight", parameter=name
        )
    named = not name.startswith(("blk.", "token_embd", "output."))
    heads = heads or (Heads(*said["heads"]) if "heads" in said else None)
    order = interleaving(tree, stem, u.shape[0], heads) if tree and named else None
    placed = u if order is None else taken(u, order)
    assert isinstance(placed, LowRank)
    a, b = (placed.b, placed.a.T) if stem == "token_embd" else (placed.a, placed.b)
    return {f"{stem}.weight.lora_a": a, f"{stem}.weight.lora_b": b}


def _metadata(adapter: Adapter, arch: str, alpha: float) -> dict[str, str]:
    meta = adapter.meta
    kept = dict(meta.metadata) if meta.source == "gguf" else {}
    types = json.loads(kept.pop(TYPES, "{}")) | {ALPHA: ["FLOAT32"]}
    kept.pop(DEQUANTISED, None)
    tokens = meta.config.get("alora_invocation_tokens")
    if tokens:
        kept[TOKENS], types[TOKENS] = json.dumps(list(tokens)), ["ARRAY", "UINT32"]
    if meta.history:
        kept["loratools.history"] = "\n".join(meta.history)
    said = {ARCH: arch, "general.type": "adapter", "adapter.type": "lora", ALPHA: json.dumps(alpha)}
    return {**kept, **said, TYPES: json.dumps(types, sort_keys=True)}


FORMATS.add("gguf")(Gguf())
