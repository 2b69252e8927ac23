"""cloneofsimo/lora: factors numbered in the order in which the model's modules are visited; scale 1.

safetensors: ``unet:<i>:up`` (out, r), ``unet:<i>:down`` (r, in), ``text_encoder:<i>:...``; learned tokens ``<name>``.
Pickled lists: up, down, up, down, ... without any name. docs/formats/cloneofsimo.md
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from loratools.core.adapter import Adapter
from loratools.core.update import Leaf, Update
from loratools.errors import ConversionError, NameUnresolvedError
from loratools.formats.base import FORMATS, Format
from loratools.formats.blocks import baked
from loratools.formats.metadata import carried, with_hashes
from loratools.formats.modules import Found, check_kinds, refuse_options
from loratools.formats.pairs import Parts, Tensor, low_rank_of, pair
from loratools.formats.spaces import ready
from loratools.io.base import Base
from loratools.io.bundle import Bundle
from loratools.kinds.lowrank import LowRank

_KEY = re.compile(r"(unet|text_encoder):(\d+):(up|down)")
_TOKEN = re.compile(r"<[^<>]+>")
_WIDTHS = {"down": (320, 640, 1280), "up": (1280, 640, 320)}  # of the levels of Stable Diffusion 1 and 2 with attention
_TARGETS = {"unet": '["GEGLU", "CrossAttention", "Attention"]', "text_encoder": '["CLIPAttention"]'}


class Cloneofsimo(Format):
    """The first LoRA trainer of Stable Diffusion 1 and 2."""

    name = "cloneofsimo"
    accepts: ClassVar[tuple[type[Update], ...]] = (LowRank,)

    def declines(self, bundle: Bundle) -> str | None:
        """Claim numbered ups and downs of a UNet or text encoder, and nameless lists of them."""
        if any(map(_KEY.fullmatch, bundle.tensors)):
            return None
        listed = list(bundle.tensors.items())
        shapes = [leaf.shape for _, leaf in listed]
        pairs = list(zip(shapes[::2], shapes[1::2], strict=False))
        numbered = (
            bool(pairs) and [key for key, _ in listed] == [str(i) for i in range(len(listed))] and len(listed) % 2 == 0
        )
        fits = numbered and all(len(u) == len(d) == 2 and u[1] == d[0] for u, d in pairs)
        return None if fits else "no unet:0:up, and no list of up and down factors"

    def decode(self, bundle: Bundle, *, base: Base | None = None, allow_unknown: bool = False) -> Adapter:
        """Read every pair; names are those of the module visited then, if all shapes agree with Stable Diffusion's."""
        modules, rest = _sorted(bundle.tensors)
        found = Found()
        for component, numbered in modules.items():
            updates = {i: pair(parts, f"{component}:{i}") for i, parts in numbered.items()}
            names = _names(component, {i: u.shape for i, u in updates.items()})
            if names is None:
                found.remarks.append(f"{component}: the shapes are not Stable Diffusion's, names stay numbers")
            for i, u in updates.items():
                found.add(f"{names[i] if names else f'{component}:{i}'}.weight", u, numbered[i])
        tokens = [key for key in rest if _TOKEN.fullmatch(key)]
        found.rest(rest, allow_unknown=allow_unknown, known=lambda key: key in tokens)
        return found.adapter(bundle, self.name, base)

    def encode(self, adapter: Adapter, *, base: Base | None = None, **options: Any) -> Bundle:
        """Write numbered pairs of every module that the trainer visits; scales are multiplied into ``up``."""
        refuse_options(self.name, options)
        check_kinds(adapter, self.accepts, self.name)
        own = adapter.meta.source == self.name
        spoken = ready(adapter, "diffusers", format=self.name)
        numbers = {} if own else _numbers(spoken)
        tensors: dict[str, Tensor] = {}
        ranks: dict[str, str] = {}
        for name, update in spoken.items():
            u = baked(low_rank_of(name, update)[0])
            keys = (
                adapter.meta.layout[name]["keys"] if own else {"b": f"{numbers[name]}:up", "a": f"{numbers[name]}:down"}
            )
            tensors |= {keys["b"]: u.b, keys["a"]: u.a}
            if not keys["b"].isdecimal():
                ranks[keys["b"].removesuffix(":up") + ":rank"] = str(u.rank)
        targets = {c: _TARGETS[c] for c in _TARGETS if any(key.startswith(f"{c}:") for key in tensors)}
        metadata = {**targets, **carried(adapter.meta, self.name), **ranks}
        return Bundle(
            tensors | (dict(adapter.meta.leftover) if own else {}),
            with_hashes(metadata, tensors),
            container="safetensors",
        )


def _sorted(tensors: Mapping[str, Leaf]) -> tuple[dict[str, dict[int, Parts]], dict[str, Leaf]]:
    modules: dict[str, dict[int, Parts]] = {}
    rest: dict[str, Leaf] = {}
    for key, leaf in tensors.items():
        found = _KEY.fullmatch(key)
        if not found and not key.isdecimal():
            rest[key] = leaf
            continue
        component, i, side = (
            (found[1], int(found[2]), found[3]) if found else ("list", int(key) // 2, "ud"[int(key) % 2])
        )
        modules.setdefault(component, {}).setdefault(i, {})[{"u": "b", "d": "a"}[side[0]]] = (key, leaf)
    return modules, rest


def visited(component: str, text_width: int = 768) -> list[tuple[str, tuple[int, int]]]:
    """Return (module, (out, in)) in the order of the trainer: down, up and middle blocks; CLIP's k, v, q, out."""
    if component == "text_encoder":
        width = text_width
        order = ("k_proj", "v_proj", "q_proj", "out_proj")
        return [
            (f"text_encoder.text_model.encoder.layers.{i}.self_attn.{p}", (width, width))
            for i in range(12)
            for p in order
        ]
    blocks = [(f"down_blocks.{i}.attentions.{j}", d) for i, d in enumerate(_WIDTHS["down"]) for j in range(2)]
    blocks += [(f"up_blocks.{i + 1}.attentions.{j}", d) for i, d in enumerate(_WIDTHS["up"]) for j in range(3)]
    return [entry for block, d in [*blocks, ("mid_block.attentions.0", 1280)] for entry in _block(block, d, text_width)]


def _block(path: str, d: int, text_width: int) -> list[tuple[str, tuple[int, int]]]:
    inside = [(f"attn1.{p}", (d, d)) for p in ("to_q", "to_k", "to_v", "to_out.0")] + [("ff.net.0.proj", (8 * d, d))]
    inside += [
        ("attn2.to_q", (d, d)),
        ("attn2.to_k", (d, text_width)),
        ("attn2.to_v", (d, text_width)),
        ("attn2.to_out.0", (d, d)),
    ]
    return [(f"unet.{path}.transformer_blocks.0.{p}", shape) for p, shape in inside]


def _names(component: str, shapes: Mapping[int, tuple[int, ...]]) -> list[str] | None:
    """Return the modules by number if every shape agrees, else None; a list may be of either model."""
    for candidate in ("unet", "text_encoder") if component == "list" else (component,):
        for width in (768, 1024):
            order = visited(candidate, width)
            if [shapes.get(i) for i in range(len(order))] == [shape for _, shape in order] and len(order) == len(
                shapes
            ):
                return [module for module, _ in order]
    return None


def _numbers(adapter: Adapter) -> dict[str, str]:
    found: dict[str, str] = {}
    for component in ("unet", "text_encoder"):
        order = [f"{module}.weight" for module, _ in visited(component)]
        if any(name in adapter for name in order):
            missing = [name for name in order if name not in adapter]
            if missing:
                raise ConversionError(
                    "the trainer's files hold every module it visits", got=f"no update of {missing[0]}"
                )
            found |= {name: f"{component}:{i}" for i, name in enumerate(order)}
    unknown = [name for name in adapter if name not in found]
    if unknown:
        raise NameUnresolvedError("a module that the trainer never visits", got=", ".join(unknown[:3]))
    return found


FORMATS.add("cloneofsimo")(Cloneofsimo())
