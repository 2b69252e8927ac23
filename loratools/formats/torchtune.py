"""torchtune's own files: ``layers.N.attn.q_proj.lora_a.weight`` (r, in), ``.lora_b.weight`` (out, r), ``.magnitude``.

q and k of Llama and Mistral are in Meta's row order, magnitudes too. The scale is in the sidecar, if there is one.
docs/formats/torchtune.md
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from loratools.core.adapter import Adapter
from loratools.core.update import Update
from loratools.errors import NameUnresolvedError, NeedsBaseError
from loratools.formats.base import FORMATS, Format
from loratools.formats.blocks import baked, taken
from loratools.formats.metadata import carried, with_hashes
from loratools.formats.modules import Found, check_kinds, refuse_options
from loratools.formats.pairs import Parts, Tensor, grouped, low_rank_of, pair
from loratools.formats.peft.config import settings
from loratools.formats.spaces import ready
from loratools.formats.stored import as_linear, on_output_axis
from loratools.formats.trees import (
    TORCHTUNE,
    Heads,
    Tree,
    from_theirs,
    heads_of,
    interleaving,
    inverse,
    to_theirs,
    tree_of,
)
from loratools.io.base import Base
from loratools.io.bundle import Bundle
from loratools.kinds.dora import Dora
from loratools.kinds.lowrank import LowRank

_ROLES = {"lora_a.weight": "a", "lora_b.weight": "b", "magnitude": "magnitude"}


class Torchtune(Format):
    """Adapters of torchtune's LoRALinear and DoRALinear."""

    name = "torchtune"
    accepts: ClassVar[tuple[type[Update], ...]] = (LowRank, Dora)

    def holds(self, adapter: Adapter, name: str) -> bool:
        """Magnitudes over the output axis only."""
        return super().holds(adapter, name) and on_output_axis(adapter, name)

    def declines(self, bundle: Bundle) -> str | None:
        """Claim ``lora_a.weight`` and ``lora_b.weight``, whatever lies beside."""
        modules, _ = grouped(bundle.tensors, _ROLES)
        return None if any("a" in parts for parts in modules.values()) else "no lora_a.weight among the keys"

    def decode(self, bundle: Bundle, *, base: Base | None = None, allow_unknown: bool = False) -> Adapter:
        """Read every module; with a base (its config.json) names and row orders become Hugging Face's."""
        modules, rest = grouped(bundle.tensors, _ROLES)
        said = settings(bundle.config) if bundle.config and "lora_alpha" in bundle.config else None
        tree = None if base is None else tree_of(TORCHTUNE, str(base.config.get("model_type")), "torchtune")
        found = Found()
        for stem, parts in modules.items():
            u = _update(stem, parts)
            if said is not None:
                u = _scaled(u, said.scale(said.alpha_of()(stem), _direction(u).rank))
            name, done = _placed(stem, u, tree, None if base is None else heads_of(base.config))
            found.add(f"{name}.weight", done, parts, stem=stem)
        found.rest(rest, allow_unknown=allow_unknown)
        if said is None:
            found.remarks.append("no adapter_config.json: the scale (alpha / rank) is unknown, 1 stands for it")
        if tree is None:
            found.remarks.append("names and row orders stay torchtune's: --base MODEL gives Hugging Face's")
        namespace = "torchtune" if tree is None else "hf"
        return found.adapter(bundle, self.name, None, scaled=said is not None, namespace=namespace)

    def encode(self, adapter: Adapter, *, base: Base | None = None, **options: Any) -> Bundle:
        """Write torchtune's keys as safetensors; the base's config.json says model type and head counts."""
        refuse_options(self.name, options)
        check_kinds(adapter, self.accepts, self.name)
        own = adapter.meta.source == self.name
        if base is None and not own:
            raise NeedsBaseError("torchtune's names and row orders depend on the model", hint="--base MODEL")
        spoken = ready(adapter, "hf", format=self.name)
        tensors: dict[str, Tensor] = {}
        for name in spoken:
            tensors |= _tensors(name, as_linear(spoken, name), adapter, base, own)
        metadata = carried(adapter.meta, self.name)
        leftover = dict(adapter.meta.leftover) if own else {}
        return Bundle(tensors | leftover, with_hashes(metadata, tensors), config=None, container="safetensors")


def _update(stem: str, parts: Parts) -> Update:
    direction = pair({role: part for role, part in parts.items() if role != "magnitude"}, stem)
    return Dora(direction, parts["magnitude"][1]) if "magnitude" in parts else direction


def _direction(u: Update) -> LowRank:
    direction = u.direction if isinstance(u, Dora) else u
    assert isinstance(direction, LowRank)
    return direction


def _scaled(u: Update, scale: float) -> Update:
    d = _direction(u)
    new = LowRank(d.b, d.a, scale, d.shape)
    return Dora(new, u.magnitude, u.axis, u.eps) if isinstance(u, Dora) else new


def _placed(stem: str, u: Update, tree: Tree | None, heads: Heads | None) -> tuple[str, Update]:
    if tree is None:
        return stem, u
    path = from_theirs(tree, stem)
    if path is None:
        raise NameUnresolvedError("no table says what Hugging Face calls this module", parameter=stem)
    order = interleaving(tree, stem, u.shape[0], heads)
    return path, u if order is None else taken(u, inverse(order))


def _tensors(name: str, u: Update, adapter: Adapter, base: Base | None, own: bool) -> dict[str, Tensor]:
    module = name.removesuffix(".weight")
    tree = None if base is None else tree_of(TORCHTUNE, str(base.config.get("model_type")), "torchtune")
    said: Mapping[str, Any] = adapter.meta.layout.get(name, {}) if own else {}
    stem = said.get("stem") or (None if tree is None else to_theirs(tree, module))
    if stem is None:
        raise NameUnresolvedError("torchtune's model has no such module", parameter=name)
    if stem != module:
        if tree is None or base is None:
            raise NeedsBaseError("names were translated on reading: pass the same --base on writing", parameter=name)
        order = interleaving(tree, stem, u.shape[0], heads_of(base.config))
        u = u if order is None else taken(u, order)
    direction, magnitude = low_rank_of(name, u)
    direction = direction if own else baked(direction)
    found: dict[str, Tensor] = {f"{stem}.lora_a.weight": direction.a, f"{stem}.lora_b.weight": direction.b}
    return found if magnitude is None else {**found, f"{stem}.magnitude": magnitude}


FORMATS.add("torchtune")(Torchtune())
