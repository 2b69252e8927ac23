"""kohya's single files: ``<prefix>_<path_with_underscores>.lora_down.weight``, ``.lora_up.weight``, ``.alpha``.

Scale: alpha / rank, alpha a tensor per module; none means scale 1, and so does a stored 0 (sd-scripts reads "unset").
``dora_scale`` is a magnitude over the axis that its shape says. docs/formats/kohya.md
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from loratools.core.adapter import Adapter
from loratools.core.update import Update
from loratools.errors import ConversionError
from loratools.formats import algebra, sgm
from loratools.formats.base import FORMATS, Format
from loratools.formats.blocks import baked
from loratools.formats.metadata import NAMES, carried, with_figures, with_hashes
from loratools.formats.modules import Found, check_kinds, refuse_options
from loratools.formats.names import flat
from loratools.formats.pairs import Layout, Tensor, grouped, scale_and_rank, unchanged
from loratools.formats.spaces import PREFIX, fused_flux, ready, unflattened, world
from loratools.formats.stored import as_linear, is_embedding
from loratools.io.base import Base
from loratools.io.bundle import Bundle
from loratools.kinds.dense import Dense
from loratools.kinds.dora import Dora
from loratools.kinds.lowrank import LowRank

BUNDLE = "bundle_emb."  # embeddings that some web interfaces pack into the file
_XL_WIDTH = 2048  # of SDXL's text features: the only Stable Diffusion of that width


class Kohya(Format):
    """Plain LoRA and DoRA of sd-scripts and its kin."""

    name = "kohya"
    accepts: ClassVar[tuple[type[Update], ...]] = (LowRank, Dora)
    module: ClassVar[str] = "networks.lora"

    def declines(self, bundle: Bundle) -> str | None:
        """Claim flattened names with down and up factors and nothing beyond LoRA."""
        reason = flattened(bundle)
        return reason or ("factors beyond LoRA (LyCORIS)" if algebra.is_lycoris(bundle.tensors) else None)

    def decode(self, bundle: Bundle, *, base: Base | None = None, allow_unknown: bool = False) -> Adapter:
        """Read every module; names are resolved as far as the file, the base or a known family says."""
        modules, rest = grouped(bundle.tensors, algebra.ROLES)
        given = json.loads(bundle.metadata.get(NAMES, "{}"))
        names = unflattened(modules, base, given)
        found = Found()
        for stem, parts in modules.items():
            for leaf, update in algebra.read(parts, stem, zero=1.0).items():
                found.add(f"{names.get(stem, stem)}.{leaf}", update, parts, stem=stem)
        found.rest(rest, allow_unknown=allow_unknown, known=lambda key: key.startswith(BUNDLE))
        found.remarks += remarks(found.layout, found.updates)
        unknown = [stem for stem in modules if stem not in names]
        if unknown:
            found.remarks.append(
                f"{len(unknown)} flattened names belong to no known model (--base names them): {unknown[0]}"
            )
        return found.adapter(bundle, self.name, base)

    def encode(
        self,
        adapter: Adapter,
        *,
        base: Base | None = None,
        prefix: str = "lora_te",
        unet: str = "auto",
        bake: bool = False,
        **options: Any,
    ) -> Bundle:
        """Write flattened names.

        ``prefix`` goes before names of language models (kohya settles none); ``unet`` is ``auto``, ``diffusers`` or
        ``authors``: how the UNet's modules are spelled (``auto``: the authors' names for SDXL, as sd-scripts does);
        ``bake`` multiplies the scales into the factors and writes no alpha, for readers that mistake alphas.
        """
        refuse_options(self.name, options)
        check_kinds(adapter, self.accepts, self.name)
        stems = _stems(adapter, self.name, prefix, unet)
        tensors: dict[str, Tensor] = {}
        for name, spelled in stems.updates.items():
            layout = said_before(adapter, name, self.name)
            update, layout = _baked(spelled, layout) if bake else (spelled, layout)
            parts = algebra.write(update, name.rpartition(".")[2], layout)
            tensors |= {keys_of(layout, stems.stem[name], role): t for role, t in parts.items()}
        if adapter.meta.source == self.name:
            tensors |= adapter.meta.leftover
        metadata = _described(adapter, self.name, self.module, stems)
        return Bundle(tensors, with_hashes(metadata, tensors), container="safetensors")


def _baked(u: Update, layout: Layout) -> tuple[Update, Layout]:
    """Return a pair at scale 1, and a layout that wants no alpha; other algebras keep theirs."""
    direction = u.direction if isinstance(u, Dora) else u
    if not isinstance(direction, LowRank):
        return u, layout
    done = replace(u, direction=baked(direction)) if isinstance(u, Dora) else baked(direction)
    return done, {"keys": {}, **{k: v for k, v in layout.items() if k != "alpha"}}


class _Stems:
    """Updates as linear layers have them, and the flattened name of each."""

    def __init__(self, updates: Mapping[str, Update], stem: Mapping[str, str]) -> None:
        self.updates, self.stem = updates, stem


def flattened(bundle: Bundle) -> str | None:
    """Return why a bundle is no file of flattened module names, or None."""
    modules, _ = grouped({k: t for k, t in bundle.tensors.items() if not k.startswith(BUNDLE)}, algebra.ROLES)
    stems = [stem for stem, parts in modules.items() if parts.keys() - algebra.SHARED.keys() - {"magnitude"}]
    if not stems:
        return "no lora_down.weight or other LyCORIS leaf among the keys"
    dotted = next((stem for stem in stems if "." in stem and not PREFIX.match(stem)), None)
    return None if dotted is None else f"module names are not flattened, e.g. {dotted}"


def remarks(layout: Mapping[str, Layout], updates: Mapping[str, Update]) -> list[str]:
    """Say what programs read differently: a stored alpha of 0."""
    zero = [name for name in updates if layout[name].get("alpha", {}).get("value") == 0]
    if not zero:
        return []
    return [f"alpha 0 is stored for {len(zero)} modules ({zero[0]}): scale 1 to sd-scripts, 0 to ComfyUI and diffusers"]


def said_before(adapter: Adapter, name: str, format: str) -> Layout:
    """Return what the source said about an update, where the source spoke this format."""
    layout: Layout = adapter.meta.layout.get(name, {}) if adapter.meta.source == format else {}
    return layout


def keys_of(layout: Layout, stem: str, role: str) -> str:
    """Return the key of a role: as the file had it, or the usual one."""
    return str(layout.get("keys", {}).get(role) or f"{stem}.{algebra.LEAF_OF[role]}")


def _stems(adapter: Adapter, format: str, prefix: str, unet: str) -> _Stems:
    if adapter.meta.source == format:
        own = {n: adapter.meta.layout.get(n, {}).get("stem") or _stem(n, prefix, False) for n in adapter}
        return _Stems({n: as_linear(adapter, n) for n in adapter}, own)
    if all(world(n) in ("hf", "kohya") for n in adapter) and prefix:
        for name in adapter:
            if is_embedding(name):
                raise ConversionError("an update of an embedding has no place in a kohya file", parameter=name)
    spoken = adapter if any(world(n) == "kohya" for n in adapter) else _spelled(adapter, format, unet)
    xl = any(n.startswith("text_encoder_2.") for n in spoken) or any("clip_g" in n for n in spoken)
    many = xl or any(n.startswith("diffusion_model.double_blocks") for n in spoken)
    updates = {n: as_linear(spoken, n) for n in spoken}
    return _Stems(updates, {n: _stem(n, prefix, many) for n in spoken})


def _spelled(adapter: Adapter, format: str, unet: str) -> Adapter:
    """Return the adapter in the names that kohya flattens: diffusers' for SD 1 and 2, the authors' for XL and Flux."""
    if all(world(n) == "hf" for n in adapter):
        return ready(adapter, "hf", format=format)
    spoken = ready(adapter, "diffusers", format=format)
    flux = {n: u for n, u in spoken.items() if n.startswith("transformer.")}
    others = {n: u for n, u in spoken.items() if n not in flux}
    if unet == "authors" or (unet == "auto" and _is_xl(others)):
        attended = sgm.attended_levels(n.removeprefix("unet.") for n in others)
        others = {_authors(n, attended): u for n, u in others.items()}
    return replace(spoken, updates=others | (fused_flux(flux) if flux else {}))


def _is_xl(updates: Mapping[str, Update]) -> bool:
    wide = any(".attn2.to_k." in n and u.shape[1] == _XL_WIDTH for n, u in updates.items() if len(u.shape) > 1)
    return wide or any(n.startswith("text_encoder_2.") for n in updates)


def _authors(name: str, attended: set[int]) -> str:
    module, _, leaf = name.rpartition(".")
    path = sgm.to_authors(module.removeprefix("unet."), attended) if module.startswith("unet.") else None
    return name if path is None else f"diffusion_model.{path}.{leaf}"


def _stem(name: str, prefix: str, many: bool) -> str:
    """Return the flattened name; ``many`` text encoders are numbered."""
    module = name.rpartition(".")[0]
    head, _, path = module.partition(".")
    match world(name):
        case "kohya":
            return module
        case "hf":
            return f"{prefix}_{flat(module)}"
        case "authors" if head == "text_encoders":
            encoder, _, path = path.partition(".transformer.")
            return f"lora_te{ {'clip_l': 1, 'clip_g': 2}.get(encoder, 3) if many else '' }_{flat(path)}"
    if not head.startswith("text_encoder"):
        return f"lora_unet_{flat(path)}"
    number = "3" if path.startswith(("encoder.block", "shared")) else head.removeprefix("text_encoder_")
    return f"lora_te{('1' if number == 'text_encoder' else number) if many else ''}_{flat(path)}"


def _described(adapter: Adapter, format: str, module: str, stems: _Stems) -> dict[str, str]:
    """Return notes, true figures, and the names that no reader could unflatten by itself."""
    metadata = carried(adapter.meta, format)
    forms = [(s, r) for s, r in map(scale_and_rank, stems.updates.values()) if r is not None]
    stale = any(
        not unchanged(u, said_before(adapter, n, format)) for n, u in stems.updates.items() if not isinstance(u, Dense)
    )
    if stale and forms:
        metadata = with_figures(metadata, ((rank, scale * rank) for scale, rank in forms))
        metadata.setdefault("ss_network_module", module)
    if adapter.meta.source == format:
        return metadata
    every = {stems.stem[n]: n.rpartition(".")[0] for n in stems.updates if world(n) != "kohya"}
    known = unflattened(every, None, {})
    lost = {stem: name for stem, name in every.items() if known.get(stem) != name}
    return {**metadata, NAMES: json.dumps(lost, sort_keys=True)} if lost else metadata


FORMATS.add("kohya")(Kohya())
