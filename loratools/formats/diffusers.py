"""diffusers' ``pytorch_lora_weights.safetensors``, new and old spellings. docs/formats/diffusers.md

New: ``<component>.<path>.lora_A.weight``; the scale is in ``__metadata__["lora_adapter_metadata"]``, a JSON object of
``LoraConfig`` fields under ``<component>.``; without it the scale is 1. Old: processors, ``lora_linear_layer``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from loratools.core.adapter import Adapter
from loratools.core.update import Leaf, Update
from loratools.errors import FormatError
from loratools.formats.base import FORMATS, Format
from loratools.formats.blocks import baked
from loratools.formats.diffusers_config import scales, written
from loratools.formats.kohya import said_before
from loratools.formats.metadata import carried, with_hashes
from loratools.formats.modules import Found, check_kinds, refuse_options
from loratools.formats.pairs import Parts, Tensor, grouped, low_rank_of, pair, split, written_pair
from loratools.formats.spaces import COMPONENTS, component_of, ready
from loratools.formats.stored import as_linear, is_bias_of_factors, on_output_axis
from loratools.io.base import Base
from loratools.io.bundle import Bundle
from loratools.kinds.dense import Dense
from loratools.kinds.dora import Dora
from loratools.kinds.lowrank import LowRank
from loratools.linalg.namespace import down, dtype_name, up

CONFIG = "lora_adapter_metadata"
_LEAF = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector", "bias": "lora_B.bias"}
_ROLES = {
    "lora_A.weight": "a", "lora_B.weight": "b", "lora_B.bias": "bias", "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude", "lora.down.weight": "a", "lora.up.weight": "b",
    "lora_linear_layer.down.weight": "a", "lora_linear_layer.up.weight": "b",
}  # fmt: skip
_PROCESSOR = re.compile(r"(.*?)(?:\.processor)?\.to_(q|k|v|out)_lora\.(down|up)\.weight")
_TEXT = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
_UNET = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}


class Diffusers(Format):
    """LoRA files of diffusers pipelines."""

    name = "diffusers"
    accepts: ClassVar[tuple[type[Update], ...]] = (LowRank, Dora, Dense)

    def holds(self, adapter: Adapter, name: str) -> bool:
        """Magnitudes over the output axis; differences of biases beside factors only."""
        whole = isinstance(adapter[name], Dense) and not is_bias_of_factors(adapter, name)
        return super().holds(adapter, name) and on_output_axis(adapter, name) and not whole

    def declines(self, bundle: Bundle) -> str | None:
        """Claim modules under a component's name, bare paths of a diffusion model, and attention processors."""
        if bundle.config is not None and ("peft_type" in bundle.config or "lora_parameters" in bundle.config):
            return "a sidecar of another program"
        modules, rest = _sorted(bundle.tensors)
        if not modules:
            return "no factors in diffusers' spelling"
        foreign = [stem for stem in modules if not _component(stem)]
        if foreign:
            return f"modules outside the components of a pipeline, e.g. {foreign[0]}"
        return (
            "alphas or other tensors of ComfyUI's kind"
            if any(k.endswith((".alpha", ".dora_scale")) for k in rest)
            else None
        )

    def decode(self, bundle: Bundle, *, base: Base | None = None, allow_unknown: bool = False) -> Adapter:
        """Read every module under its component; scales from the metadata, else 1."""
        modules, rest = _sorted(bundle.tensors)
        names = {stem: _named(stem) for stem in modules}
        ranks = {names[stem]: _rank(parts, stem) for stem, parts in modules.items()}
        said = scales(bundle.metadata.get(CONFIG), ranks)
        found = Found()
        for stem, parts in modules.items():
            _add(found, parts, stem, names[stem], said[names[stem]])
        found.rest(rest, allow_unknown=allow_unknown)
        if CONFIG not in bundle.metadata:
            found.remarks.append("the file says no scale: 1, as diffusers reads it")
        return found.adapter(bundle, self.name, base)

    def encode(
        self, adapter: Adapter, *, base: Base | None = None, component: str = "", bake: bool = False, **options: Any
    ) -> Bundle:
        """Write the new spelling with the scales in the metadata.

        ``component`` says what bare paths belong to; ``bake`` multiplies the scales into the factors instead, for
        diffusers before 0.34, which ignore the metadata.
        """
        refuse_options(self.name, options)
        check_kinds(adapter, self.accepts, self.name)
        spoken = ready(adapter, "diffusers", format=self.name, component=component)
        tensors: dict[str, Tensor] = {}
        forms: dict[str, tuple[int, float]] = {}
        for name in spoken:
            module, _, leaf = name.rpartition(".")
            layout = said_before(spoken, name, self.name)
            parts, form = _written(spoken, name, leaf, bake, layout)
            tensors |= {layout.get("keys", {}).get(r) or f"{module}.{_LEAF[r]}": t for r, t in parts.items()}
            forms |= {} if form is None else {module: form}
        if adapter.meta.source == self.name:
            tensors |= adapter.meta.leftover
        metadata = written({"format": "pt", **carried(adapter.meta, self.name)}, spoken, forms)
        return Bundle(
            tensors, with_hashes(metadata, tensors), container="safetensors", weights="pytorch_lora_weights.safetensors"
        )


def _sorted(tensors: Mapping[str, Leaf]) -> tuple[dict[str, Parts], dict[str, Leaf]]:
    """Return module -> parts over all spellings, and the rest."""
    modules, rest = grouped({k: t for k, t in tensors.items() if not _PROCESSOR.fullmatch(k)}, _ROLES)
    for key, leaf in tensors.items():
        if found := _PROCESSOR.fullmatch(key):
            spelled = _TEXT if ".self_attn" in found[1] else _UNET
            parts = modules.setdefault(f"{found[1]}.{spelled[found[2]]}", {})
            role = {"down": "a", "up": "b"}[found[3]]
            if role in parts:
                raise FormatError("two keys name one tensor", parameter=key, got=parts[role][0])
            parts[role] = (key, leaf)
    return {stem: modules[stem] for stem in sorted(modules, key=_order(tensors))}, rest


def _order(tensors: Mapping[str, Leaf]) -> Any:
    """Return a key that keeps modules in the order of the file."""
    at: dict[str, int] = {}
    for i, key in enumerate(tensors):
        found = _PROCESSOR.fullmatch(key)
        stem = (
            f"{found[1]}.{(_TEXT if '.self_attn' in found[1] else _UNET)[found[2]]}" if found else split(key, _ROLES)[0]
        )
        at.setdefault(stem, i)
    return at.__getitem__


def _component(stem: str) -> str | None:
    head, _, rest = stem.partition(".")
    if head in COMPONENTS:
        return None if head == "transformer" and rest.startswith("h.") else head
    found = component_of(stem)
    return found if found in COMPONENTS else None


def _named(stem: str) -> str:
    head = stem.partition(".")[0]
    return stem if head in COMPONENTS else f"{_component(stem)}.{stem}"


def _rank(parts: Parts, stem: str) -> int:
    direction = pair(parts, stem)
    assert isinstance(direction, LowRank)
    return direction.rank


def _add(found: Found, parts: Parts, stem: str, name: str, scale: float) -> None:
    direction = pair(parts, stem)
    assert isinstance(direction, LowRank)
    scaled = LowRank(direction.b, direction.a, scale, direction.shape)
    u: Update = scaled
    if "magnitude" in parts:
        u = Dora(scaled, parts["magnitude"][1].reshape((u.shape[0],)))
    found.add(f"{name}.weight", u, parts)
    if "bias" in parts:
        found.add(f"{name}.bias", Dense(parts["bias"][1], scale), parts)


def _written(
    adapter: Adapter, name: str, leaf: str, bake: bool, layout: Mapping[str, Any]
) -> tuple[dict[str, Tensor], tuple[int, float] | None]:
    """Return role -> tensor of one update, and (rank, scale) where it has factors."""
    update = as_linear(adapter, name)
    if leaf == "bias":
        return {"bias": _bias(adapter, name, update, bake)}, None
    direction, magnitude = low_rank_of(name, update)
    said = baked(direction) if bake else direction
    parts = written_pair(said, layout.get("axes"))
    if magnitude is not None:
        axes = layout.get("magnitude_axes") or (1 if len(direction.shape) == 2 else len(direction.shape))
        parts["magnitude"] = magnitude if axes == 1 else magnitude.reshape((1, direction.shape[0], *(1,) * (axes - 2)))
    return parts, (said.rank, said.scale)


def _bias(adapter: Adapter, name: str, update: Update, bake: bool) -> Tensor:
    """Return the bias of lora_B, which the module's scale multiplies."""
    weight = adapter.get(f"{name.removesuffix('.bias')}.weight")
    if not isinstance(update, Dense) or weight is None:
        raise FormatError("a bias difference needs factors of its module beside it", parameter=name)
    scale = 1.0 if bake else low_rank_of(name, weight)[0].scale
    return update.d if update.scale == scale else down(up(update.d) * (update.scale / scale), dtype_name(update.d))


FORMATS.add("diffusers")(Diffusers())
