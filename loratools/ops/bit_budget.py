"""A budget of bytes as bits per rank component: the next bit goes where it saves most squared error per byte.

A component of energy sigma^2 whose both vectors have b bits keeps (1 - d_b)^2 of it, d_b the distortion of b bits on a
Gaussian. Refinement mends low bits further, so a second table holds what is typically left after it; the encoder tries
both and keeps the better. The steps have falling returns, so greedy is optimal but for the last bytes.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from math import inf
from typing import NamedTuple

from loratools.kinds.packed import payload_bytes
from loratools.linalg.levels import DISTORTION, HALF

LADDER = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, HALF)
PLAIN = {**{b: 1.0 - (1.0 - d) ** 2 for b, d in DISTORTION.items()}, HALF: 1e-7}
MENDED = {**PLAIN, 1: 0.28, 2: 0.09, 3: 0.03, 4: 0.01, 5: 0.0035, 6: 0.0011, 7: 3e-4}
"""Share of a component's energy that is lost, by bits: plainly rounded, and typically after refinement."""


class Module(NamedTuple):
    """What a module offers: its squared singular values, descending, and the shape of its parameter."""

    energies: Sequence[float]
    shape: tuple[int, ...]


def allocate(
    modules: Mapping[str, Module], budget: int, *, lost: Mapping[int, float], group: int = 0, least: int = 0
) -> dict[str, tuple[int, ...]] | None:
    """Return the bits of every kept component, per module, of codes and scales within ``budget`` bytes.

    ``least`` bits go to every component first; None where that alone exceeds the budget. O(N log N) steps.
    """
    prices = {name: [payload_bytes((b, 1), m.shape, group) for b in LADDER] for name, m in modules.items()}
    level = {name: [LADDER.index(least) if least else -1] * len(m.energies) for name, m in modules.items()}
    left = budget - sum(prices[n][at] for n, levels in level.items() for at in levels if at >= 0)
    if left < 0:
        return None
    heap = [
        (-_worth(e, level[name][j], prices[name], lost), i, j, name)
        for i, (name, m) in enumerate(modules.items())
        for j, e in enumerate(m.energies)
        if e > 0 and level[name][j] + 1 < len(LADDER)
    ]
    heapq.heapify(heap)
    while heap:
        _, i, j, name = heapq.heappop(heap)
        at = level[name][j]
        price = prices[name][at + 1] - (prices[name][at] if at >= 0 else 0)
        if price > left:
            continue
        level[name][j], left = at + 1, left - price
        if at + 2 < len(LADDER):
            heapq.heappush(heap, (-_worth(modules[name].energies[j], at + 1, prices[name], lost), i, j, name))
    return {
        name: tuple(sorted((LADDER[at] for at in levels if at >= 0), reverse=True)) for name, levels in level.items()
    }


def _worth(energy: float, at: int, prices: Sequence[int], lost: Mapping[int, float]) -> float:
    """Return the squared error per byte that the next step saves."""
    before, paid = (1.0, 0) if at < 0 else (lost[LADDER[at]], prices[at])
    saved, price = energy * (before - lost[LADDER[at + 1]]), prices[at + 1] - paid
    return saved / price if price else inf  # vectors of a few entries: more bits in the same byte


def allocations(modules: Mapping[str, Module], budget: int, *, group: int = 0) -> list[dict[str, tuple[int, ...]]]:
    """Return the different ways worth trying: by both tables, and from the most bits that every component can have."""
    found = [allocate(modules, budget, lost=lost, group=group) for lost in (PLAIN, MENDED)]
    floors = (allocate(modules, budget, lost=MENDED, group=group, least=b) for b in (8, 6, 5, 4, 3, 2, 1))
    found.append(next((one for one in floors if one is not None), None))
    unique: list[dict[str, tuple[int, ...]]] = []
    for one in found:
        if one is not None and one not in unique:
            unique.append(one)
    return unique
