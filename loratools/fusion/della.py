"""DELLA: drop at random, the small ones more likely."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from loratools.core.update import Array, Delta, namespace
from loratools.errors import UsageError
from loratools.fusion.base import Between, Density, fusion
from loratools.fusion.elements import elected
from loratools.fusion.thinning import thinned
from loratools.linalg.namespace import up, working_dtype
from loratools.linalg.seeds import Key, uniform


@fusion(
    "della",
    reference="arXiv:2406.11617",
    guarantee="exact on the true update, masks fixed by seed and content; then truncated",
    identity={"density": 1.0, "epsilon": 0.0},
)
def della(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    *,
    density: Density = 0.5,
    epsilon: Annotated[float, Between(0, 1)] = 0.15,
    seed: int = 0,
) -> Delta:
    """Keep entries with a probability that grows with their rank in the row, rescale, elect signs, average.

    The probability rises from density - epsilon for the smallest entry of a row to density + epsilon for its largest;
    what stays is divided by it. Raises UsageError unless both lie in (0, 1].
    """
    if not (density - epsilon > 0 and density + epsilon <= 1):
        raise UsageError(
            "density and epsilon do not fit", expected="0 < density - epsilon and density + epsilon <= 1",
            got=f"{density:g} and {epsilon:g}",
        )  # fmt: skip
    return thinned(deltas, weights, seed, lambda x, key, rows: _pruned(x, density, epsilon, key, rows), elected)


def _pruned(x: Array, density: float, epsilon: float, key: Key, rows: range) -> Array:
    if density >= 1:
        return x
    xp = namespace(x)
    rank = up(xp.argsort(xp.argsort(xp.abs(x), axis=1), axis=1), working_dtype(x))
    p = density - epsilon + rank * (2 * epsilon / max(x.shape[1] - 1, 1))
    return xp.where(uniform(key, rows, x.shape[1], like=x) < p, x / p, 0.0)
