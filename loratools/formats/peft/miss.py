"""``peft_type: MISS``: one block repeated along the inputs (PEFT's ``MissConfig``; Bone before it, arXiv:2409.15371).

D[:, c] = block[c mod r, :], which is LoRA with a fixed A of ones; "mini" repeats a narrower block along the outputs,
too. "bat" cuts W into blocks of r x r, and adds W_pq M_p + M_p to each.
"""

from __future__ import annotations

from loratools.core.lazy import computed
from loratools.core.update import Array, Update
from loratools.errors import FormatError
from loratools.formats.peft.tuner import Module, Size, Tuner
from loratools.formats.peft.types import peft_type
from loratools.kinds.bat import Bat
from loratools.kinds.lowrank import LowRank
from loratools.linalg.namespace import namespace, up, working_dtype


class Blocks(Tuner):
    """What MiSS and Bone share; ``leaf`` is the name of the block."""

    leaf: str

    def size(self, m: Module) -> Size:
        """Return (out, None); nothing of "mini", whose block is as wide as one repeat."""
        shape = m[self.leaf].shape
        if len(shape) == 3:
            return shape[0] * shape[1], None
        return None if _is_mini(m) else shape[1], None

    def weight(self, m: Module) -> Update:
        """Return the repeated block, or the coat of "bat"."""
        block = m[self.leaf]
        if len(block.shape) == 3:
            return Bat(block, m.shape)
        (out, n), (r, width) = m.shape, block.shape
        if out % width or (out != width and not _is_mini(m)):
            raise FormatError("the block does not repeat along the outputs", expected=out, got=width)
        dtype = working_dtype(block)

        def left() -> Array:
            b = up(block, dtype).T
            return namespace(b).tile(b, (out // width, 1))

        def right() -> Array:
            xp = namespace(up(block, dtype))
            ones = xp.eye(r, dtype=getattr(xp, dtype))
            return xp.tile(ones, (1, -(-n // r)))[:, :n]

        return LowRank(computed((out, r), left, dtype), computed((r, n), right, dtype))


@peft_type("MISS")
class Miss(Blocks):
    """Shards shared along the inputs; rank at most r, but for "bat"."""

    type = "MISS"
    leaf = "miss_block"
    leaves = ("miss_block",)


def _is_mini(m: Module) -> bool:
    return m.fields.config.get("init_weights") == "mini"
