"""``peft_type: BOFT``: W' = s o (W B_1^T ... B_m^T), a butterfly of rotations (arXiv:2311.06243).

``boft_R`` (m, c, b, b) holds the blocks of m factors; C = (1 - S)(1 + S)^-1 with S = (R - R^T) / 2. Factor i couples
halves of blocks that lie 2^i apart. ``boft_s`` (out, 1), (1, out) for a convolution, scales the outputs, not the bias.
"""

from __future__ import annotations

from math import prod

from loratools.core.lazy import computed
from loratools.core.update import Array, Leaf, Update, namespace
from loratools.errors import FormatError
from loratools.formats.peft.tuner import Module, Size, Tuner
from loratools.formats.peft.types import peft_type
from loratools.kinds.block_diagonal import BlockDiagonal
from loratools.kinds.composed import Composed
from loratools.kinds.multiplied import Multiplied
from loratools.kinds.scaled import Scaled
from loratools.linalg.cayley import cayley
from loratools.linalg.namespace import down, up

TURNS, GAIN = "boft_R", "boft_s"


@peft_type("BOFT")
class Boft(Tuner):
    """Inputs turned by a butterfly, outputs scaled."""

    type = "BOFT"
    leaves = (TURNS, GAIN)

    def size(self, m: Module) -> Size:
        """Return (out, in), in flat over a kernel."""
        shape = m[TURNS].shape
        if len(shape) != 4 or shape[2] != shape[3]:
            raise FormatError("these are no blocks", parameter=m.path, expected="(factors, count, b, b)", got=shape)
        return prod(m[GAIN].shape), shape[1] * shape[2]

    def weight(self, m: Module) -> Update:
        """Return the factors in the order in which they act, then the scale."""
        gain = Scaled(m[GAIN].reshape((m.shape[0],)), m.shape)
        factors = range(m[TURNS].shape[0])
        return Composed((*(Multiplied(BlockDiagonal(_turns(m[TURNS], i), 2**i), m.shape) for i in factors), gain))


def _turns(stored: Leaf, i: int) -> Leaf:
    """Return C^T - 1 of every block of factor ``i``, computed in fp64 when it is read."""

    def compute() -> Array:
        r = up(stored, "float64")[i, ...]
        xp = namespace(r)
        s = 0.5 * (r - xp.matrix_transpose(r))
        return down(xp.matrix_transpose(cayley(s)), "float32")

    return computed(stored.shape[1:], compute)
