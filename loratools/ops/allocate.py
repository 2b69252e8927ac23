"""A budget of bytes, shared out: the singular values of all modules compete per byte.

The total squared error is the sum of what is cut everywhere, so the best use of a byte is the largest sigma^2 per byte.
Buying in that order is optimal for every budget that it spends exactly; what a nearly spent budget leaves is settled by
exchanges of one step between two modules, until none lowers the error.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Module:
    """What a module offers: squared singular values, descending, and what one more rank costs in bytes."""

    energies: Sequence[float]
    cost: int


def allocate(modules: Mapping[str, Module], budget: int, *, step: int = 1, cap: int) -> dict[str, int] | None:
    """Return ranks, each at least ``step`` (or all there is), of total cost within ``budget``; None if impossible.

    Ranks are multiples of ``step``, or all that a module has, and at most ``cap``. No exchange of one step between two
    modules lowers the total error within the budget. O(N log N) for N components, and O(M^2) per exchange.
    """
    ladders = {name: _ladder(module, step, cap) for name, module in modules.items()}
    level = dict.fromkeys(modules, 0)
    left = budget - sum(ladder[0][1] for ladder in ladders.values())
    if left < 0:
        return None
    heap = [(-_worth(ladder, 1), name) for name, ladder in ladders.items() if len(ladder) > 1]
    heapq.heapify(heap)
    while heap:
        _, name = heapq.heappop(heap)
        ladder, at = ladders[name], level[name] + 1
        price = ladder[at][1] - ladder[at - 1][1]
        if price > left:
            continue  # too dear for what is left; the exchanges below look at it again
        level[name], left = at, left - price
        if at + 1 < len(ladder):
            heapq.heappush(heap, (-_worth(ladder, at + 1), name))
    _exchange(ladders, level, left)
    return {name: ladders[name][at][0] for name, at in level.items()}


Ladder = list[tuple[int, int, float]]  # rank, cost, energy kept; one rung per step


def _ladder(module: Module, step: int, cap: int) -> Ladder:
    top = min(len(module.energies), cap)
    ranks = sorted({min(r, top) for r in range(step, top + step, step)})
    return [(r, r * module.cost, float(sum(module.energies[:r]))) for r in ranks]


def _worth(ladder: Ladder, at: int) -> float:
    """Energy per byte of the step up to ``at``."""
    return (ladder[at][2] - ladder[at - 1][2]) / max(ladder[at][1] - ladder[at - 1][1], 1)


def _exchange(ladders: Mapping[str, Ladder], level: dict[str, int], left: int) -> None:
    """Step one module up, paid for by stepping another down (or by what is left), while that keeps more energy."""
    while True:
        best, move, change = 0.0, None, 0
        ups = [(n, *_move(ladders[n], level[n], 1)) for n in ladders if level[n] + 1 < len(ladders[n])]
        downs = [(n, *_move(ladders[n], level[n], -1)) for n in ladders if level[n] > 0]
        for up, price, gain in ups:
            for down, refund, loss in (("", 0, 0.0), *downs):
                if up != down and price + refund <= left and gain + loss > best * (1 + 1e-12):
                    best, move, change = gain + loss, (up, down), price + refund
        if move is None:
            return
        level[move[0]] += 1
        if move[1]:
            level[move[1]] -= 1
        left -= change


def _move(ladder: Ladder, at: int, by: int) -> tuple[int, float]:
    """Return (cost, energy gained) of moving ``by`` rungs; both negative for a step down."""
    return ladder[at + by][1] - ladder[at][1], ladder[at + by][2] - ladder[at][2]
