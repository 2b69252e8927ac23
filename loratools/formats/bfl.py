"""Flux as its authors (Black Forest Labs) and as diffusers build it: other names, and fused against split projections.

The authors fuse q, k, v (and the single blocks' MLP) into one parameter; diffusers keeps them apart, and swaps the two
halves (shift, scale) of the last modulation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from loratools.core.update import Update
from loratools.formats.blocks import joined, split, taken

MLP_RATIO = 4  # of every published Flux model: needed only where the MLP part of linear1 is absent
_IMAGE = ("attn.to_q", "attn.to_k", "attn.to_v")
_TEXT = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
_FUSED = {
    ("double_blocks", "img_attn.qkv"): _IMAGE,
    ("double_blocks", "txt_attn.qkv"): _TEXT,
    ("single_blocks", "linear1"): (*_IMAGE, "proj_mlp"),
}
_BLOCKS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
_RENAMED = {
    ("double_blocks", "img_attn.proj"): "attn.to_out.0", ("double_blocks", "txt_attn.proj"): "attn.to_add_out",
    ("double_blocks", "img_mlp.0"): "ff.net.0.proj", ("double_blocks", "img_mlp.2"): "ff.net.2",
    ("double_blocks", "txt_mlp.0"): "ff_context.net.0.proj", ("double_blocks", "txt_mlp.2"): "ff_context.net.2",
    ("double_blocks", "img_mod.lin"): "norm1.linear", ("double_blocks", "txt_mod.lin"): "norm1_context.linear",
    ("single_blocks", "linear2"): "proj_out", ("single_blocks", "modulation.lin"): "norm.linear",
}  # fmt: skip
_SINGLE = {
    "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}  # fmt: skip
_SWAPPED = "norm_out.linear"
_BACK = {(_BLOCKS[block], new): (block, old) for (block, old), new in _RENAMED.items()}
_SINGLE_BACK = {new: old for old, new in _SINGLE.items()}
_PART_OF = {
    (_BLOCKS[block], part): (block, whole, i)
    for (block, whole), parts in _FUSED.items() for i, part in enumerate(parts)
}  # fmt: skip


def is_authors(path: str) -> bool:
    """True for a module path as the authors name it."""
    return path in _SINGLE or path.startswith(("double_blocks.", "single_blocks."))


def to_diffusers(path: str, u: Update) -> dict[str, Update] | None:
    """Return the updates of diffusers' modules for one of the authors', or None for a path that Flux does not have."""
    if path in _SINGLE:
        new = _SINGLE[path]
        return {new: _swapped(u) if new == _SWAPPED else u}
    found = re.fullmatch(r"(double_blocks|single_blocks)\.(\d+)\.(.+)", path)
    if not found:
        return None
    home = f"{_BLOCKS[found[1]]}.{found[2]}."
    if (found[1], found[3]) in _RENAMED:
        return {home + _RENAMED[found[1], found[3]]: u}
    parts = _FUSED.get((found[1], found[3]))
    return None if parts is None else dict(zip((home + p for p in parts), split(u, _sizes(u, len(parts))), strict=True))


def fused_sizes(path: str, u: Update) -> list[int] | None:
    """Return the rows of each part of one of the authors' fused projections, or None for another module."""
    found = re.fullmatch(r"(double_blocks|single_blocks)\.\d+\.(.+)", path)
    parts = _FUSED.get((found[1], found[2])) if found else None
    return None if parts is None else _sizes(u, len(parts))


def _sizes(u: Update, count: int) -> list[int]:
    """q, k and v are as wide as the input; the MLP takes the rest. Biases have no input: thirds, or 1:1:1:4."""
    out = u.shape[0]
    d = u.shape[1] if len(u.shape) > 1 else out // (count if count == 3 else 3 + MLP_RATIO)
    return [d] * 3 + ([out - 3 * d] if count == 4 else [])


def to_authors(updates: Mapping[str, Update]) -> tuple[dict[str, Update], list[str]]:
    """Return the updates of the authors' modules for those of diffusers, fused; and the paths that are unknown."""
    done: dict[str, Update] = {}
    fused: dict[str, dict[int, Update]] = {}
    unknown = []
    for path, u in updates.items():
        found = re.fullmatch(r"(transformer_blocks|single_transformer_blocks)\.(\d+)\.(.+)", path)
        if path in _SINGLE_BACK:
            done[_SINGLE_BACK[path]] = _swapped(u) if path == _SWAPPED else u
        elif found and (found[1], found[3]) in _BACK:
            block, old = _BACK[found[1], found[3]]
            done[f"{block}.{found[2]}.{old}"] = u
        elif found and (found[1], found[3]) in _PART_OF:
            block, whole, i = _PART_OF[found[1], found[3]]
            fused.setdefault(f"{block}.{found[2]}.{whole}", {})[i] = u
            done.setdefault(f"{block}.{found[2]}.{whole}", u)  # keeps its place in the order
        else:
            unknown.append(path)
    return {**done, **{path: _fused(path, parts) for path, parts in fused.items()}}, unknown


def _fused(path: str, parts: Mapping[int, Update]) -> Update:
    count = 4 if path.endswith("linear1") else 3
    first = next(iter(parts.values()))
    d = (
        first.shape[1]
        if len(first.shape) > 1
        else next(u.shape[0] // (MLP_RATIO if i == 3 else 1) for i, u in parts.items())
    )
    sizes: Sequence[int] = [d] * 3 + ([parts[3].shape[0] if 3 in parts else MLP_RATIO * d] if count == 4 else [])
    return joined([parts.get(i) for i in range(count)], sizes)


def _swapped(u: Update) -> Update:
    half = u.shape[0] // 2
    return taken(u, [*range(half, 2 * half), *range(half)])
