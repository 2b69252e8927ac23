"""``peft_type: C3A``: D = circulant blocks / in (arXiv:2407.19342, PEFT's ``C3AConfig``)."""

from __future__ import annotations

from loratools.formats.peft.tuner import Module, Size, Tuner
from loratools.formats.peft.types import peft_type
from loratools.kinds.circulant import Circulant


@peft_type("C3A")
class C3A(Tuner):
    """Circular convolutions; full rank."""

    type = "C3A"
    leaves = ("c3a_kernel",)

    def size(self, m: Module) -> Size:
        """Return (out, in)."""
        p, q, b = m.axes("c3a_kernel", 3)
        return p * b, q * b

    def weight(self, m: Module) -> Circulant:
        """Return the blocks."""
        return Circulant(m["c3a_kernel"], 1.0 / m.shape[1])
