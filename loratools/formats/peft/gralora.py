"""``peft_type: GRALORA``: a grid of k x k products of rank r / k (arXiv:2505.20355, PEFT's ``GraloraConfig``).

Block (j, n) of D is (A[n][:, j] B[j][n])^T, with A[n] (in / k, r) cut into k stretches of columns, and B[j]
(r, out / k) into k stretches of rows. ``gralora_A_general`` and ``_B_general`` are an ordinary pair beside it.
"""

from __future__ import annotations

from loratools.core.lazy import computed
from loratools.core.update import Delta
from loratools.errors import FormatError
from loratools.formats.peft.tuner import Module, Size, Tuner
from loratools.formats.peft.types import peft_type
from loratools.kinds.lowrank import LowRank
from loratools.kinds.sum import Sum
from loratools.leaf import Array
from loratools.linalg.namespace import namespace, up, working_dtype

A, B = "gralora_A_general.weight", "gralora_B_general.weight"


@peft_type("GRALORA")
class Gralora(Tuner):
    """Granular factors; rank at most k r, and that of the pair beside."""

    type = "GRALORA"
    leaves = ("gralora_A", "gralora_B", A, B)

    def size(self, m: Module) -> Size:
        """Return (out, in)."""
        (k, n, _), (_, _, out) = m.axes("gralora_A", 3), m.axes("gralora_B", 3)
        return k * out, k * n

    def weight(self, m: Module) -> Delta:
        """Return the grid as one product of rank k r, and the pair beside it."""
        (k, _, r), hybrid = m.axes("gralora_A", 3), m.fields.integer("hybrid_r", 0)
        m.need("gralora_B", (k, r, m.shape[0] // k))
        if r % k:
            raise FormatError("the rank does not divide into the grid", expected=f"a multiple of {k}", got=r)
        scale = m.fields.number("alpha") / (r + hybrid)
        grid = _grid(m, k, r, scale)
        if not hybrid:
            return grid
        return Sum((grid, LowRank(m[B], m[A], scale)))


def _grid(m: Module, k: int, r: int, scale: float) -> LowRank:
    """Return the factors; column (j, n, s) of b lies in block row j, row (j, n, s) of a in block column n."""
    a, b = m["gralora_A"], m["gralora_B"]
    dtype = working_dtype(a, b)

    def left() -> Array:
        x = up(b, dtype)  # (j, (n, s), out)
        xp = namespace(x)
        eye = xp.eye(k, dtype=x.dtype)
        blocks = xp.permute_dims(x, (0, 2, 1))  # (j, out, (n, s))
        return (blocks[:, :, None, :] * eye[:, None, :, None]).reshape(m.shape[0], k * r)

    def right() -> Array:
        x = up(a, dtype).reshape(k, -1, k, r // k)  # (n, in, j, s)
        xp = namespace(x)
        eye = xp.eye(k, dtype=x.dtype)
        blocks = xp.permute_dims(x, (2, 0, 3, 1))  # (j, n, s, in)
        return (blocks[:, :, :, None, :] * eye[None, :, None, :, None]).reshape(k * r, m.shape[1])

    return LowRank(computed((m.shape[0], k * r), left, dtype), computed((k * r, m.shape[1]), right, dtype), scale)
