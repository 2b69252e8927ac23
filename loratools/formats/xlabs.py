"""XLabs' Flux files: attention processors with fused projections, scale 1. docs/formats/xlabs.md

``double_blocks.N.processor.{qkv,proj}_lora{1,2}.{down,up}.weight`` (1 the image stream, 2 the text stream) and
``single_blocks.N.processor.{qkv,proj}_lora.{down,up}.weight``; the single blocks' qkv is the top of ``linear1``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from loratools.core.adapter import Adapter
from loratools.core.update import Leaf, Update
from loratools.errors import ConversionError, FormatError
from loratools.formats.base import FORMATS, Format
from loratools.formats.bfl import MLP_RATIO
from loratools.formats.blocks import baked, is_zero, taken, with_rows_below
from loratools.formats.metadata import carried, with_hashes
from loratools.formats.modules import Found, check_kinds, refuse_options
from loratools.formats.pairs import Parts, Tensor, low_rank_of, pair
from loratools.formats.spaces import ready
from loratools.io.base import Base
from loratools.io.bundle import Bundle
from loratools.kinds.lowrank import LowRank

_KEY = re.compile(r"(double|single)_blocks\.(\d+)\.processor\.(qkv|proj)_lora([12]?)\.(down|up)\.weight")
_MODULES = {
    ("double", "qkv", "1"): "img_attn.qkv", ("double", "proj", "1"): "img_attn.proj",
    ("double", "qkv", "2"): "txt_attn.qkv", ("double", "proj", "2"): "txt_attn.proj",
    ("single", "qkv", ""): "linear1", ("single", "proj", ""): "linear2",
}  # fmt: skip
_BACK = {(kind, module): f"{part}_lora{stream}" for (kind, part, stream), module in _MODULES.items()}


class Xlabs(Format):
    """Flux LoRA of XLabs' x-flux trainer."""

    name = "xlabs"
    accepts: ClassVar[tuple[type[Update], ...]] = (LowRank,)

    def declines(self, bundle: Bundle) -> str | None:
        """Claim processors of Flux blocks."""
        keys = (key.removeprefix("diffusion_model.") for key in bundle.tensors)
        return None if any(map(_KEY.fullmatch, keys)) else "no Flux attention processors among the keys"

    def decode(self, bundle: Bundle, *, base: Base | None = None, allow_unknown: bool = False) -> Adapter:
        """Read every module; the rows of ``linear1`` below q, k, v are zero."""
        modules, rest = _sorted(bundle.tensors)
        found = Found()
        for module, parts in modules.items():
            u = pair(parts, module)
            assert isinstance(u, LowRank)
            if module.endswith("linear1"):
                u = with_rows_below(u, MLP_RATIO * u.shape[1])
            found.add(f"diffusion_model.{module}.weight", u, parts)
        found.rest(rest, allow_unknown=allow_unknown)
        return found.adapter(bundle, self.name, base)

    def encode(self, adapter: Adapter, *, base: Base | None = None, **options: Any) -> Bundle:
        """Write the modules that XLabs' processors reach; scales are multiplied into ``up``."""
        refuse_options(self.name, options)
        check_kinds(adapter, self.accepts, self.name)
        spoken = ready(adapter, "authors", format=self.name)
        tensors: dict[str, Tensor] = {}
        for name, update in spoken.items():
            u, _ = low_rank_of(name, update)
            stem, u = _written(name, baked(u))
            said = spoken.meta.layout.get(name, {}).get("keys", {}) if adapter.meta.source == self.name else {}
            tensors |= {said.get("a", f"{stem}.down.weight"): u.a, said.get("b", f"{stem}.up.weight"): u.b}
        if adapter.meta.source == self.name:
            tensors |= adapter.meta.leftover
        return Bundle(tensors, with_hashes(carried(adapter.meta, self.name), tensors), container="safetensors")


def _sorted(tensors: Mapping[str, Leaf]) -> tuple[dict[str, Parts], dict[str, Leaf]]:
    modules: dict[str, Parts] = {}
    rest: dict[str, Leaf] = {}
    for key, leaf in tensors.items():
        found = _KEY.fullmatch(key.removeprefix("diffusion_model."))
        module = None if found is None else _MODULES.get((found[1], found[3], found[4]))
        if found is None or module is None:
            rest[key] = leaf
            continue
        parts = modules.setdefault(f"{found[1]}_blocks.{found[2]}.{module}", {})
        role = {"down": "a", "up": "b"}[found[5]]
        if role in parts:
            raise FormatError("two keys name one tensor", parameter=key, got=parts[role][0])
        parts[role] = (key, leaf)
    return modules, rest


def _written(name: str, u: LowRank) -> tuple[str, LowRank]:
    found = re.fullmatch(r"diffusion_model\.(double|single)_blocks\.(\d+)\.(.+)\.weight", name)
    part = _BACK.get((found[1], found[3])) if found else None
    if found is None or part is None:
        raise ConversionError("XLabs' processors reach only the attention of Flux blocks", parameter=name)
    if found[3] == "linear1":
        top = 3 * u.shape[1]
        if not is_zero(taken(u, slice(top, u.shape[0]))):
            raise ConversionError("XLabs' files hold only the q, k, v rows of linear1", parameter=name)
        u = LowRank(taken(u, slice(0, top)).b, u.a, u.scale)  # type: ignore[attr-defined]
    return f"{found[1]}_blocks.{found[2]}.processor.{part}", u


FORMATS.add("xlabs")(Xlabs())
