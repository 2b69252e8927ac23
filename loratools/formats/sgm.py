"""Stable Diffusion's UNet (1.5, 2, XL) as its authors and as diffusers name it: arithmetic, two layers per block."""

from __future__ import annotations

import re
from collections.abc import Iterable

_PER_LEVEL = 3  # two layers, and the down- or upsampler
_RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "out_layers.0": "norm2", "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj", "skip_connection": "conv_shortcut",
}  # fmt: skip
_RESNET_BACK = {new: old for old, new in _RESNET.items()}
_SINGLE = {
    "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
}  # fmt: skip
_SINGLE_BACK = {new: old for old, new in _SINGLE.items()}
_MIDDLE = {"0": "mid_block.resnets.0", "1": "mid_block.attentions.0", "2": "mid_block.resnets.1"}
_MIDDLE_BACK = {new: old for old, new in _MIDDLE.items()}


def to_diffusers(path: str) -> str | None:
    """Return the diffusers path of a module as its authors name it, or None."""
    if path in _SINGLE:
        return _SINGLE[path]
    if found := re.fullmatch(r"middle_block\.([012])\.(.+)", path):
        return _join(_MIDDLE[found[1]], found[2])
    found = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d)\.(.+)", path)
    if not found or (found[1] == "input" and found[2] == "0"):
        return None
    place = int(found[2]) - (found[1] == "input")
    level, layer = divmod(place, _PER_LEVEL)
    block = "down_blocks" if found[1] == "input" else "up_blocks"
    if found[4] == "op":
        return f"{block}.{level}.downsamplers.0.conv"
    if found[4] == "conv":
        return f"{block}.{level}.upsamplers.0.conv"
    part = "resnets" if found[3] == "0" else "attentions"
    return _join(f"{block}.{level}.{part}.{layer}", found[4])


def _join(place: str, rest: str) -> str | None:
    if ".resnets." not in place:
        return f"{place}.{rest}"
    return f"{place}.{_RESNET[rest]}" if rest in _RESNET else None


def to_authors(path: str, attended: Iterable[int]) -> str | None:
    """Return the authors' path of a diffusers module, or None. ``attended``: the up levels that hold attention."""
    if path in _SINGLE_BACK:
        return _SINGLE_BACK[path]
    if found := re.fullmatch(r"(mid_block\.(?:resnets|attentions)\.\d)\.(.+)", path):
        rest = _RESNET_BACK.get(found[2]) if "resnets" in found[1] else found[2]
        return None if rest is None else f"middle_block.{_MIDDLE_BACK[found[1]]}.{rest}"
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", path)
    if not found:
        return None
    down = found[1] == "down"
    level = int(found[2])
    start = _PER_LEVEL * level + down
    if found[3].endswith("samplers"):
        slot = 0 if down else 2 if level in set(attended) else 1
        return f"{'input' if down else 'output'}_blocks.{start + 2}.{slot}.{'op' if down else 'conv'}"
    rest = _RESNET_BACK.get(found[5]) if found[3] == "resnets" else found[5]
    slot = int(found[3] == "attentions")
    return None if rest is None else f"{'input' if down else 'output'}_blocks.{start + int(found[4])}.{slot}.{rest}"


def attended_levels(paths: Iterable[str]) -> set[int]:
    """Return the up levels whose attention occurs among diffusers paths."""
    found = (re.match(r"up_blocks\.(\d+)\.attentions\.", path) for path in paths)
    return {int(m[1]) for m in found if m}
