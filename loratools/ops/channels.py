"""How much each input channel of a module matters, from statistics: the root of its mean square."""

from __future__ import annotations

from collections.abc import Mapping

from loratools.core.update import Array, namespace
from loratools.kinds.lowrank import LowRank
from loratools.linalg.namespace import up
from loratools.ops.weighing import Weighing


def channel_weights(weigh: Weighing | None, directions: Mapping[str, LowRank]) -> dict[str, Array]:
    """Return the weights (in,) of the columns of every update whose module has statistics of its inputs.

    Of a Gram matrix the diagonal counts. A parameter stored (in, out) has its inputs on the rows and stays unweighted.
    Raises FormatError for what is no weight.
    """
    if weigh is None:
        return {}
    found: dict[str, Array] = {}
    for name, u in directions.items():
        square = weigh.weights(name, u).right if name in weigh and name not in weigh.turned else None
        if square is not None:
            xp, square = namespace(square), up(square)
            found[name] = xp.sqrt(xp.linalg.diagonal(square) if square.ndim == 2 else square)
    return found
