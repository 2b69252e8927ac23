"""``peft_type: DELORA``: D = B diag(lambda / (r |a_k| |b_k|)) A diag(w) (arXiv:2503.18225, PEFT's ``DeloraConfig``).

a_k are the rows of A, b_k the columns of B, norms at least 1e-4; w are the norms of the base's columns, saved as
``delora_w_norm``.
"""

from __future__ import annotations

from loratools.core.lazy import computed
from loratools.formats.peft.tuner import Module, Size, Tuner
from loratools.formats.peft.types import peft_type
from loratools.kinds.lowrank import LowRank
from loratools.leaf import Array
from loratools.linalg.namespace import namespace, up, working_dtype

_LEAST = 1e-4


@peft_type("DELORA")
class Delora(Tuner):
    """Normalised factors under one strength; rank at most r."""

    type = "DELORA"
    leaves = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")

    def size(self, m: Module) -> Size:
        """Return (out, in)."""
        return m.axes("delora_B", 2)[0], m.axes("delora_A", 2)[1]

    def weight(self, m: Module) -> LowRank:
        """Return the product, both diagonals taken into A."""
        b, a = m["delora_B"], m["delora_A"]
        strength, norms = m.need("delora_lambda", (1,)), m.need("delora_w_norm", (a.shape[1],))
        dtype, rank = working_dtype(b, a), a.shape[0]

        def scaled() -> Array:
            left, right = up(b, dtype), up(a, dtype)
            xp = namespace(left)
            sizes = [xp.clip(xp.linalg.vector_norm(x, axis=axis), min=_LEAST) for x, axis in ((right, 1), (left, 0))]
            gain = up(strength, dtype) / rank / (sizes[0] * sizes[1])
            return gain[:, None] * right * up(norms, dtype)

        return LowRank(b, computed(a.shape, scaled, dtype))
