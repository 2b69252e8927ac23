"""Generic files of ComfyUI, ai-toolkit and kin: dotted module paths, LoRA or LyCORIS leaves. docs/formats/comfy.md

``diffusion_model.<the authors' path>``, ``text_encoders.<name>.transformer.<path>``; also diffusers paths with alphas.
Scale: alpha / rank, none means 1, a stored 0 means 0 (as ComfyUI reads it).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from loratools.core.adapter import Adapter
from loratools.core.update import Leaf, Update
from loratools.formats import algebra
from loratools.formats.base import FORMATS, Format
from loratools.formats.kohya import BUNDLE, remarks, said_before
from loratools.formats.metadata import carried, with_hashes
from loratools.formats.modules import Found, check_kinds, refuse_options
from loratools.formats.pairs import Parts, Tensor, grouped, with_magnitude
from loratools.formats.spaces import AUTHORS, PREFIX, component_of, ready, world
from loratools.formats.stored import as_linear
from loratools.io.base import Base
from loratools.io.bundle import Bundle
from loratools.kinds.dense import Dense
from loratools.kinds.dora import Dora
from loratools.kinds.hadamard import Hadamard
from loratools.kinds.kronecker import Kronecker
from loratools.kinds.lowrank import LowRank
from loratools.kinds.replace import Replace
from loratools.kinds.tucker import Tucker

_LEAF = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "dora_scale", "replace": "set_weight"}
_ROLES = {
    **algebra.ROLES, "lora_A.weight": "a", "lora_B.weight": "b", "lora.down.weight": "a", "lora.up.weight": "b",
    "lora_A": "a", "lora_B": "b", "magnitude": "plain_magnitude", "set_weight": "replace",
}  # fmt: skip
_BESIDE = {"alpha", "magnitude", "plain_magnitude"}  # what says nothing without factors
_NOT_LORA = ("reshape_weight",)


class Comfy(Format):
    """Dotted names; what ComfyUI loads for every model it knows."""

    name = "comfy"
    accepts: ClassVar[tuple[type[Update], ...]] = (LowRank, Dora, Tucker, Hadamard, Kronecker, Dense, Replace)

    def declines(self, bundle: Bundle) -> str | None:
        """Claim dotted paths of a diffusion model, or any dotted path with down/up factors or alphas."""
        if bundle.config is not None and ("peft_type" in bundle.config or "lora_parameters" in bundle.config):
            return "a sidecar of another program"
        sorted_, _ = grouped(_factors(bundle.tensors), _ROLES)
        modules = [stem for stem, parts in sorted_.items() if parts.keys() - _BESIDE]
        if not modules:
            return "no factors under dotted names"
        if all("." not in stem or PREFIX.match(stem) for stem in modules):
            return "flattened names"
        if any(stem.startswith("base_model.model.") or ".processor." in f".{stem}" for stem in modules):
            return "names of PEFT, or of attention processors"
        generic = any(stem.startswith(AUTHORS) for stem in modules)
        spelled = any(k.endswith((".lora_down.weight", ".lora_up.weight")) or _lycoris_leaf(k) for k in bundle.tensors)
        return None if generic or spelled else "no diffusion_model. or text_encoders., and no down/up factors or alphas"

    def decode(self, bundle: Bundle, *, base: Base | None = None, allow_unknown: bool = False) -> Adapter:
        """Read every module; bare paths of a known model get the component they lie in."""
        modules, rest = grouped(bundle.tensors, _ROLES)
        found = Found()
        for stem, parts in modules.items():
            for leaf, update in _read(parts, stem).items():
                found.add(f"{_named(stem)}.{leaf}", update, parts, stem=stem)
        found.rest(rest, allow_unknown=allow_unknown, known=lambda key: key.startswith(BUNDLE))
        found.remarks += remarks(found.layout, found.updates)
        return found.adapter(bundle, self.name, base)

    def encode(self, adapter: Adapter, *, base: Base | None = None, component: str = "", **options: Any) -> Bundle:
        """Write ``diffusion_model.`` names with ``lora_A``, ``lora_B`` and an alpha each.

        ``component`` says what a file of bare paths acts on (``unet``, ``transformer``, ``text_encoder``).
        """
        refuse_options(self.name, options)
        check_kinds(adapter, self.accepts, self.name)
        spoken = ready(adapter, "authors", format=self.name, component=component)
        tensors: dict[str, Tensor] = {}
        for name in spoken:
            layout = said_before(spoken, name, self.name)
            module, _, leaf = name.rpartition(".")
            update = as_linear(spoken, name)
            parts = _written(update, leaf, layout)
            stem = layout.get("stem", module)
            for role, tensor in parts.items():
                key = layout.get("keys", {}).get(role)
                tensors[key or f"{stem}.{_LEAF.get(role) or algebra.LEAF_OF[role]}"] = tensor
        if adapter.meta.source == self.name:
            tensors |= adapter.meta.leftover
        return Bundle(tensors, with_hashes(carried(adapter.meta, self.name), tensors), container="safetensors")


def _factors(tensors: Mapping[str, Leaf]) -> dict[str, Leaf]:
    return {k: t for k, t in tensors.items() if not k.startswith(BUNDLE) and not k.endswith(_NOT_LORA)}


def _lycoris_leaf(key: str) -> bool:
    _, _, leaf = key.rpartition(".")
    return leaf in algebra.BEYOND_LORA or (leaf in ("alpha", "dora_scale") and "lora" not in key.rpartition(".")[0])


def _read(parts: Parts, stem: str) -> dict[str, Update]:
    if "replace" in parts:
        return {"weight": Replace(parts["replace"][1])}
    plain = parts.get("plain_magnitude")
    updates = algebra.read({role: part for role, part in parts.items() if role != "plain_magnitude"}, stem, zero=0.0)
    direction = updates.get("weight")
    if plain is not None and isinstance(direction, LowRank):
        shape = (plain[1].shape[0],) + (1,) * (len(direction.shape) - 1)
        updates["weight"] = with_magnitude(direction, plain[1].reshape(shape), stem)
    return updates


def _written(update: Update, leaf: str, layout: Mapping[str, Any]) -> dict[str, Tensor]:
    if isinstance(update, Replace):
        return {"replace": update.value}
    parts = algebra.write(update, leaf, layout)
    if "plain_magnitude" in layout.get("keys", {}) and isinstance(update, Dora):
        del parts["magnitude"]
        parts["plain_magnitude"] = update.magnitude
    return parts


def _named(stem: str) -> str:
    """Return the module name of a stem: a bare path gets the component that it lies in."""
    component = component_of(stem) if world(f"{stem}.weight") == "hf" else None
    return stem if component is None else f"{component}.{stem}"


FORMATS.add("comfy")(Comfy())
