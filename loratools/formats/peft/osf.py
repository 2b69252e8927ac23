"""``peft_type: OSF``: the leading singular triplets of W kept, the others learned anew (arXiv:2504.07097).

``osf_svd_params.U_low`` (out, k), ``S_low`` (k,), ``V_low`` (k, in): W' = W_head + U_low diag(S_low) V_low, W_head the
best approximation of W with min(out, in) - k singular values. The signs of singular vectors do not matter.
"""

from __future__ import annotations

from loratools.core.lazy import computed
from loratools.core.update import Update
from loratools.formats.peft.tuner import Module, Size, Tuner
from loratools.formats.peft.types import peft_type
from loratools.kinds.head import Head
from loratools.kinds.lowrank import LowRank
from loratools.linalg.namespace import up, working_dtype

LEFT, VALUES, RIGHT = (f"osf_svd_params.{name}" for name in ("U_low", "S_low", "V_low"))


@peft_type("OSF")
class Osf(Tuner):
    """The tail of the base's spectrum replaced."""

    type = "OSF"
    leaves = (LEFT, VALUES, RIGHT)

    def size(self, m: Module) -> Size:
        """Return (out, in)."""
        return m[LEFT].shape[0], m[RIGHT].shape[1]

    def weight(self, m: Module) -> Update:
        """Return the head that stays and the tail that is added."""
        left = m[LEFT]
        values = m.need(VALUES, left.shape[1:])
        dtype = working_dtype(left, values)
        b = computed(left.shape, lambda: up(left, dtype) * up(values, dtype), dtype)
        return Head(LowRank(b, m[RIGHT]), min(m.shape) - left.shape[1])
