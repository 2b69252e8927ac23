"""``peft_type: DEFT``: W' = W + Q (k R - T^T W): a subspace of the outputs removed, and filled anew (``DeftConfig``).

``deft_P`` (out, r), ``deft_R`` (r, in). ``relu``: Q = P, T = max(P, 0); ``qr``: Q = T = the orthonormal factor of P,
with the signs that Householder's QR gives it. k = alpha / r, or 1 without alpha. ``para`` fills in nothing
(PaRa). Rank r.
"""

from __future__ import annotations

from loratools.core.lazy import computed
from loratools.core.update import Array, Leaf, Update, namespace
from loratools.errors import FormatError
from loratools.formats.peft.tuner import Module, Size, Tuner
from loratools.formats.peft.types import peft_type
from loratools.kinds.lowrank import LowRank
from loratools.kinds.multiplied import Multiplied
from loratools.kinds.together import Together
from loratools.linalg.namespace import down, up

P, R = "deft_P", "deft_R"


@peft_type("DEFT")
class Deft(Tuner):
    """Outputs projected, and a low-rank update of what was removed."""

    type = "DEFT"
    leaves = (P, R)

    def size(self, m: Module) -> Size:
        """Return (out, in); in is unknown where nothing is filled in."""
        return m[P].shape[0], None if m.fields.flag("para") else m[R].shape[1]

    def weight(self, m: Module) -> Update:
        """Return the projection, and with R what is put in its place."""
        p, method = m[P], m.fields.text("decomposition_method", "relu")
        if method not in ("relu", "qr"):
            raise FormatError("decomposition_method is unknown", expected="relu or qr", got=method)
        left = p if method == "relu" else computed(p.shape, lambda: _orthonormal(p))
        right = computed(p.shape[::-1], lambda: (_positive(p) if method == "relu" else _orthonormal(p)).T)
        removed = Multiplied(LowRank(left, right, -1.0), m.shape, 0)
        if m.fields.flag("para"):
            return removed
        rank = p.shape[1]
        scale = m.fields.number("alpha") / rank if m.fields.config.get("alpha") else 1.0
        return Together((removed, LowRank(left, m.need(R, (rank, m.shape[1])), scale)))


def _orthonormal(p: Leaf) -> Array:
    wide = up(p, "float64")
    return down(namespace(wide).linalg.qr(wide)[0], "float32")


def _positive(p: Leaf) -> Array:
    x = up(p)
    return namespace(x).where(x > 0, x, 0.0)
