"""How much each input channel of a module matters, from statistics: the root of its mean square."""

from __future__ import annotations

from collections.abc import Mapping

from loratools.core.adapter import Adapter
from loratools.core.update import Array, namespace
from loratools.errors import MismatchError, NumericsError
from loratools.io.stats import StatsLike, load_stats
from loratools.kinds.lowrank import LowRank
from loratools.linalg.namespace import all_finite, up


def channel_weights(stats: StatsLike | None, adapter: Adapter, directions: Mapping[str, LowRank]) -> dict[str, Array]:
    """Return the weights (in,) of the columns of every update whose module has statistics of its inputs.

    Of a Gram matrix the diagonal counts. A parameter stored (in, out) has its inputs on the rows and stays unweighted.
    Raises MismatchError for another size, NumericsError for what is no weight.
    """
    if stats is None:
        return {}
    opened = load_stats(stats)
    found: dict[str, Array] = {}
    for name, module in opened.resolve(directions).items():
        leaf = opened[module].inputs
        if leaf is None or adapter.meta.layout.get(name, {}).get("stored") == "in_out":
            continue
        square = up(leaf)
        xp = namespace(square)
        square = xp.linalg.diagonal(square) if square.ndim == 2 else square
        columns = directions[name].matrix_shape[1]
        if square.shape != (columns,):
            raise MismatchError("statistics of another size", parameter=name, expected=columns, got=tuple(square.shape))
        if not all_finite(square) or bool(xp.any(square < 0)) or not bool(xp.any(square > 0)):
            raise NumericsError("statistics are no weights", parameter=name, expected="finite, not negative, not all 0")
        found[name] = xp.sqrt(square)
    return found
