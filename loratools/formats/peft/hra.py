"""``peft_type: HRA``: W' = W H_1 ... H_r, reflections along learned directions (arXiv:2405.17484).

``hra_u`` (in, r), in flat over a kernel. The change has rank r at most: H_1 ... H_r - 1 is a product of factors (the
compact WY form). ``apply_GS`` makes the directions orthonormal first, and the product 1 - 2 Q Q^T.
"""

from __future__ import annotations

from loratools.core.lazy import computed
from loratools.core.update import Array, Leaf, Update
from loratools.formats.peft.tuner import Module, Size, Tuner
from loratools.formats.peft.types import peft_type
from loratools.kinds.lowrank import LowRank
from loratools.kinds.multiplied import Multiplied
from loratools.linalg.cayley import reflections
from loratools.linalg.namespace import down, namespace, up

LEAF = "hra_u"


@peft_type("HRA")
class Hra(Tuner):
    """Inputs reflected."""

    type = "HRA"
    leaves = (LEAF,)

    def size(self, m: Module) -> Size:
        """Return in, flat over a kernel."""
        return None, m[LEAF].shape[0]

    def weight(self, m: Module) -> Update:
        """Return the product of reflections, less the identity, as factors computed in fp64."""
        u, orthonormal = m[LEAF], m.fields.flag("apply_GS")
        return Multiplied(LowRank(_left(u, orthonormal=orthonormal), _right(u, orthonormal=orthonormal)), m.shape)


def _left(u: Leaf, *, orthonormal: bool) -> Leaf:
    def compute() -> Array:
        wide = up(u, "float64")
        return down(-2.0 * _basis(wide) if orthonormal else reflections(wide)[0], "float32")

    return computed(u.shape, compute)


def _right(u: Leaf, *, orthonormal: bool) -> Leaf:
    def compute() -> Array:
        wide = up(u, "float64")
        return down(_basis(wide).T if orthonormal else reflections(wide)[1], "float32")

    return computed(u.shape[::-1], compute)


def _basis(u: Array) -> Array:
    """Return an orthonormal basis of the columns: that of Gram and Schmidt up to signs, which Q Q^T does not see."""
    return namespace(u).linalg.qr(u)[0]
