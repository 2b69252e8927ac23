"""``peft_type: BEFT``: a difference of biases, ``beft_bias`` (1, out) (PEFT's ``BeftConfig``)."""

from __future__ import annotations

from loratools.core.update import Update
from loratools.formats.peft.tuner import Module, Size, Tuner
from loratools.formats.peft.types import peft_type
from loratools.kinds.dense import Dense

LEAF = "beft_bias"


@peft_type("BEFT")
class Beft(Tuner):
    """Biases changed, weights not."""

    type = "BEFT"
    leaves = (LEAF,)
    verbatim = True

    def size(self, m: Module) -> Size:
        """Return out."""
        return m[LEAF].shape[1], None

    def weight(self, m: Module) -> None:
        """Return nothing."""
        return

    def bias(self, m: Module) -> Update:
        """Return the difference."""
        return Dense(m[LEAF].reshape(m[LEAF].shape[1:]))
