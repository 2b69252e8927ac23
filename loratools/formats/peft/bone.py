"""``peft_type: BONE``: what PEFT called MiSS before 0.17, with another name for the block."""

from __future__ import annotations

from loratools.formats.peft.miss import Blocks
from loratools.formats.peft.types import peft_type


@peft_type("BONE")
class Bone(Blocks):
    """Block affine adaptation; rank at most r, but for "bat"."""

    type = "BONE"
    leaf = "bone_block"
    leaves = ("bone_block",)
