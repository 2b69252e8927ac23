"""``peft_type: PACA``: some columns of W trained in place (arXiv:2503.01905, the authors' fork of PEFT).

``paca_w`` (out, r) are *absolute*: W'[:, i_j] = s paca_w[:, j] at the places ``paca_indices`` (r,), s = paca_alpha / r.
So the update is s paca_w - W[:, i] times the one-hot of the places, of rank r, and needs W's values.
"""

from __future__ import annotations

from loratools.core.lazy import computed
from loratools.core.update import Array, Leaf
from loratools.errors import FormatError
from loratools.formats.peft.tuner import Module, Size, Tuner
from loratools.formats.peft.types import peft_type
from loratools.kinds.lowrank import LowRank
from loratools.linalg.namespace import cast, down, namespace, up, working_dtype

COLUMNS, PLACES = "paca_w", "paca_indices"


@peft_type("PACA")
class Paca(Tuner):
    """Columns replaced; rank at most r."""

    type = "PACA"
    leaves = (COLUMNS, PLACES)

    def size(self, m: Module) -> Size:
        """Return out: the places do not tell how many columns there are."""
        return m[COLUMNS].shape[0], None

    def weight(self, m: Module) -> LowRank:
        """Return the difference of the trained columns and the base's."""
        columns, places, base = m[COLUMNS], m.index(PLACES), m.base_leaf()
        (out, n), rank = m.shape, m.axes(COLUMNS, 2)[1]
        if places.shape != (rank,):
            raise FormatError("the places do not fit the columns", parameter=m.path, expected=(rank,), got=places.shape)
        s, dtype = m.scale(rank, "paca_alpha"), working_dtype(columns, base)

        def difference() -> Array:
            w = up(base, "float64")
            w = w.T if m.turned else w
            return down(s * up(columns, "float64") - namespace(w).take(w, _checked(places, n, m), axis=1), dtype)

        def ones() -> Array:
            index = _checked(places, n, m)
            xp = namespace(index)
            return up(xp.astype(index[:, None] == xp.arange(n)[None, :], xp.float32), dtype)

        return LowRank(computed((out, rank), difference, dtype), computed((rank, n), ones, dtype))


def _checked(places: Leaf, n: int, m: Module) -> Array:
    index = cast(places.read(), "int64")
    xp = namespace(index)
    if int(xp.min(index)) < 0 or int(xp.max(index)) >= n or len(xp.unique_values(index)) < len(index):
        raise FormatError(
            "places that repeat or are out of range", parameter=m.path, expected=f"0 to {n - 1}, each once"
        )
    return index
