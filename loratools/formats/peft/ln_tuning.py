"""``peft_type: LN_TUNING``: weights and biases of norms, stored whole (arXiv:2312.11420, PEFT's ``LNTuningConfig``)."""

from __future__ import annotations

from loratools.core.update import Update
from loratools.formats.peft.tuner import Module, Size, Tuner
from loratools.formats.peft.types import peft_type
from loratools.kinds.replace import Replace

WEIGHT, BIAS = "ln_tuning_layers.weight", "ln_tuning_layers.bias"


@peft_type("LN_TUNING")
class LnTuning(Tuner):
    """Parameters replaced."""

    type = "LN_TUNING"
    leaves = (WEIGHT, BIAS)
    as_stored = True
    verbatim = True

    def size(self, m: Module) -> Size:
        """Return the shape of the weight."""
        return m[WEIGHT].shape

    def weight(self, m: Module) -> Update:
        """Return the weight of the norm."""
        return Replace(m[WEIGHT])

    def bias(self, m: Module) -> Update | None:
        """Return the bias of the norm, where it has one."""
        return Replace(m[BIAS]) if BIAS in m else None
