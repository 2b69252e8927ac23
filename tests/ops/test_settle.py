"""Magnitudes on columns: one pass over the base, then blocks of rows give what the whole parameter gives."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import numpy as np
import pytest

from loratools.core.rows import rowwise
from loratools.kinds.dora import Dora
from loratools.kinds.lowrank import LowRank
from loratools.leaf import Leaf
from loratools.ops import settle as module
from loratools.ops.fold import correlation
from loratools.ops.settle import can_settle, once, settle

EPS = float(np.finfo(np.float32).eps)


def dora(rng: Any, *shape: int, axis: int = 1) -> Dora:
    rest = int(np.prod(shape[1:]))
    u = LowRank(
        rng.standard_normal((shape[0], 3)).astype(np.float32),
        rng.standard_normal((3, rest)).astype(np.float32),
        0.5,
        shape,
    )
    return Dora(u, (rng.random(shape[axis]) + 0.5).astype(np.float32), axis)


@pytest.mark.parametrize("shape", [(50, 7), (9, 6, 3, 3)])
@pytest.mark.parametrize("lazy", [True, False])
def test_blocks_of_rows_are_the_whole(
    shape: tuple[int, ...], lazy: bool, rng: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RANGE_BYTES", 64)
    w, u = rng.standard_normal(shape).astype(np.float32), dora(rng, *shape)
    assert can_settle(u)
    done = settle(u, Leaf(shape, "float32", lambda out: w) if lazy else w)
    rows = rowwise(done.update)
    assert rows is not None
    for i, j in ((0, 3), (3, shape[0])):
        # norms in fp64 sums here, in fp32 there; a product and a quotient
        assert np.abs(rows(i, j).apply(w[i:j]) - u.apply(w)[i:j]).max() <= 16 * EPS * np.abs(u.apply(w)).max()


def test_agreement_is_that_of_the_base(rng: Any) -> None:
    w = (rng.standard_normal((400, 30)) * (rng.random(30) + 0.1)).astype(np.float32)
    right = Dora(dora(rng, 400, 30).direction, np.linalg.norm(w, axis=0).astype(np.float32), 1)
    wrong = Dora(right.direction, (rng.random(30) + 0.1).astype(np.float32), 1)
    good, bad = (correlation(settle(u, w).sums) for u in (right, wrong))
    assert good is not None
    assert bad is not None
    assert good > 0.999
    assert bad < 0.6


def test_rows_need_no_pass(rng: Any) -> None:
    assert not can_settle(dora(rng, 5, 4, axis=0))
    assert not can_settle(LowRank.example(0))


def test_once_is_once() -> None:
    made, start = [], Barrier(4)

    def make() -> int:
        made.append(1)
        return len(made)

    get = once(make)

    def ask(_: int) -> int:
        start.wait()
        return get()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == [1, 1, 1, 1]
    assert len(made) == 1
