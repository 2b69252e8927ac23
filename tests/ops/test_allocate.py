from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.ops.allocate import Module, allocate


def lost(modules: dict[str, Module], ranks: dict[str, int]) -> float:
    return sum(sum(m.energies[ranks[n] :]) for n, m in modules.items())


def spent(modules: dict[str, Module], ranks: dict[str, int]) -> int:
    return sum(ranks[n] * m.cost for n, m in modules.items())


def made(seed: int, count: int, ranks: int) -> dict[str, Module]:
    rng = np.random.default_rng(seed)
    return {
        str(i): Module(sorted((rng.random(ranks) ** 4).tolist(), reverse=True), int(rng.integers(3, 20)))
        for i in range(count)
    }


@given(seed=st.integers(0, 200), count=st.integers(1, 4), share=st.floats(0.0, 1.2), step=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_no_exchange_of_one_step_lowers_the_error(seed: int, count: int, share: float, step: int) -> None:
    modules = made(seed, count, 5)
    least = sum(min(step, 5) * m.cost for m in modules.values())
    budget = least + int(share * sum(5 * m.cost for m in modules.values()))
    ranks = allocate(modules, budget, step=step, cap=100)
    assert ranks is not None
    assert spent(modules, ranks) <= budget
    for up, down in itertools.permutations([*modules, None], 2):
        other = dict(ranks)
        if up is not None:
            other[up] = min(other[up] + step, 5)
        if down is not None:
            other[down] -= other[down] % step or step
        if all(r >= min(step, 5) for r in other.values()) and spent(modules, other) <= budget:
            assert lost(modules, other) >= lost(modules, ranks) - 1e-12


def test_equal_costs_give_the_true_optimum() -> None:
    """With one price the leading singular values of all modules together are the best buy."""
    modules = {n: Module(m.energies, 7) for n, m in made(3, 4, 6).items()}
    for budget in range(4 * 7, 24 * 7 + 1, 7):
        ranks = allocate(modules, budget, cap=100)
        assert ranks is not None
        pool = sorted((e for m in modules.values() for e in m.energies[1:]), reverse=True)
        best = sum(pool[budget // 7 - 4 :])
        assert lost(modules, ranks) == pytest.approx(best, abs=1e-12)


def test_a_budget_below_one_rank_each_is_impossible() -> None:
    modules = made(1, 3, 4)
    least = sum(m.cost for m in modules.values())
    assert allocate(modules, least - 1, cap=100) is None
    assert allocate(modules, least, cap=100) == dict.fromkeys(modules, 1)


def test_the_cap_holds() -> None:
    assert set(allocate(made(1, 3, 4), 10**9, cap=2).values()) == {2}  # type: ignore[union-attr]
