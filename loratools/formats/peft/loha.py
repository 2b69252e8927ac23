"""``peft_type: LOHA``: D = alpha / r (w1_a w1_b) o (w2_a w2_b) (arXiv:2108.06098, PEFT's ``LoHaConfig``).

With cores (``use_effective_conv2d``) each half is a Tucker product, and its ``_a`` lies (r, out).
"""

from __future__ import annotations

from loratools.core.update import Delta
from loratools.formats.peft.tuner import Module, Size, Tuner
from loratools.formats.peft.types import peft_type
from loratools.kinds.hadamard import Hadamard
from loratools.kinds.lowrank import LowRank
from loratools.kinds.tucker import Tucker


@peft_type("LOHA")
class LoHa(Tuner):
    """Products of low rank, element by element; rank at most r^2."""

    type = "LOHA"
    leaves = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")

    def size(self, m: Module) -> Size:
        """Return (out, in), in flat over a kernel where there are no cores."""
        a, b = m["hada_w1_a"].shape, m["hada_w1_b"].shape
        if "hada_t1" not in m:
            return a[0], b[1]
        return a[1], b[1], *m.kernel(m["hada_t1"].shape[2:])

    def weight(self, m: Module) -> Hadamard:
        """Return the product of both halves."""
        return Hadamard(_half(m, 1), _half(m, 2), m.scale(m["hada_w1_b"].shape[0]))


def _half(m: Module, i: int) -> Delta:
    a, b = m[f"hada_w{i}_a"], m[f"hada_w{i}_b"]
    if "hada_t1" not in m:
        return LowRank(a, b, 1.0, m.shape)
    core = m[f"hada_t{i}"]
    return Tucker(core.reshape((*core.shape[:2], *m.shape[2:])), a.T, b)
