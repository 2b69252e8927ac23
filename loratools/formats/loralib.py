"""Microsoft's loralib: a state dict with ``<path>.lora_A`` (r, in) and ``<path>.lora_B`` (out, r), no ``.weight``.

The scale is not in the file (alpha / r of the constructor). Biases and heads are stored whole. docs/formats/loralib.md
"""

from __future__ import annotations

from typing import Any, ClassVar

from loratools.core.adapter import Adapter
from loratools.core.update import Leaf, Update
from loratools.errors import FormatError, UnsupportedError
from loratools.formats.base import FORMATS, Format
from loratools.formats.blocks import baked
from loratools.formats.kohya import said_before
from loratools.formats.matryoshka import transposed
from loratools.formats.metadata import carried, with_hashes
from loratools.formats.modules import Found, check_kinds, refuse_options
from loratools.formats.pairs import Parts, Tensor, grouped, low_rank_of, require
from loratools.formats.spaces import ready
from loratools.formats.stored import as_linear, is_embedding
from loratools.io.base import Base
from loratools.io.bundle import Bundle
from loratools.kinds.lowrank import LowRank
from loratools.kinds.replace import Replace

_ROLES = {"lora_A": "a", "lora_B": "b"}
_WHOLE = ("classifier", "score", "lm_head", "pooler", "LayerNorm", "qa_outputs")


class Loralib(Format):
    """State dicts of ``lora_state_dict``; what lies beside the factors replaces the base's parameters."""

    name = "loralib"
    accepts: ClassVar[tuple[type[Update], ...]] = (LowRank, Replace)

    def declines(self, bundle: Bundle) -> str | None:
        """Claim bare ``lora_A`` and ``lora_B`` outside litgpt's trees."""
        if bundle.config is not None and "peft_type" in bundle.config:
            return "a sidecar of PEFT"
        modules, _ = grouped(bundle.tensors, _ROLES)
        if not modules:
            return "no bare lora_A and lora_B among the keys"
        if any(key.endswith((".lora_E", "lora_ranknum")) for key in bundle.tensors):
            return "AdaLoRA's singular values"
        if any(key.endswith(".attn.qkv.lora_A") for key in bundle.tensors):
            return "litgpt's fused projections"
        if any(stem.startswith(("diffusion_model.", "unet.", "transformer_blocks.")) for stem in modules):
            return "modules of a diffusion model"
        return "lora_A (in, r), as MatryoshkaLoRA has it" if transposed(modules) else None

    def decode(self, bundle: Bundle, *, base: Base | None = None, allow_unknown: bool = False) -> Adapter:
        """Read factors, biases and heads; the scale stays unknown."""
        modules, rest = grouped(bundle.tensors, _ROLES)
        found = Found()
        for stem, parts in modules.items():
            found.add(f"{stem}.weight", _update(stem, parts), parts)
        for key, leaf in rest.items():
            if key.endswith(".bias") or any(word in key for word in _WHOLE):
                found.add(key, Replace(leaf), {"replace": (key, leaf)})
        found.rest({k: t for k, t in rest.items() if k not in found.updates}, allow_unknown=allow_unknown)
        found.remarks.append("the file does not say its scale (alpha / r of the training): 1 stands for it")
        return found.adapter(bundle, self.name, base, scaled=False)

    def encode(self, adapter: Adapter, *, base: Base | None = None, **options: Any) -> Bundle:
        """Write a state dict as safetensors; scales are multiplied into ``lora_B`` (construct with lora_alpha = r)."""
        refuse_options(self.name, options)
        check_kinds(adapter, self.accepts, self.name)
        spoken = ready(adapter, "hf", format=self.name)
        tensors: dict[str, Tensor] = {}
        for name in spoken:
            keys = said_before(spoken, name, self.name).get("keys", {})
            u = as_linear(spoken, name) if isinstance(spoken[name], LowRank) else spoken[name]
            if isinstance(u, Replace):
                tensors[keys.get("replace", name)] = u.value
                continue
            pair = baked(low_rank_of(name, u)[0])
            a, b = (pair.b.T, pair.a.T) if is_embedding(name) else (pair.a, pair.b)
            stem = name.removesuffix(".weight")
            tensors |= {keys.get("a", f"{stem}.lora_A"): a, keys.get("b", f"{stem}.lora_B"): b}
        if adapter.meta.source == self.name:
            tensors |= adapter.meta.leftover
        return Bundle(tensors, with_hashes(carried(adapter.meta, self.name), tensors), container="safetensors")


def _update(stem: str, parts: Parts) -> LowRank:
    a, b = require(parts, stem, "a", "b")
    _check(stem, a, b)
    return LowRank(a.T, b.T) if is_embedding(f"{stem}.weight") else LowRank(b, a)


def _check(stem: str, a: Leaf, b: Leaf) -> None:
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise FormatError("factors are matrices", parameter=stem, got=f"{a.shape}, {b.shape}")
    if a.shape[0] == b.shape[1]:
        return
    if a.shape[0] % b.shape[1] == 0:
        raise UnsupportedError(
            "grouped factors (MergedLinear) or a convolution (ConvLoRA): not read by this version",
            parameter=stem, got=f"{a.shape}, {b.shape}", hint="the file does not say which parts were enabled",
        )  # fmt: skip
    raise FormatError("the factors do not multiply", parameter=stem, got=f"{a.shape}, {b.shape}")


FORMATS.add("loralib")(Loralib())
