from __future__ import annotations

import threading

import pytest

from loratools.core import pool


def test_keeps_order_and_uses_the_threads_it_is_given() -> None:
    seen = set()
    barrier = threading.Barrier(2)

    def task(i: int) -> int:
        seen.add(threading.get_ident())
        if i < 2:
            barrier.wait(timeout=30)  # both threads must be here at once
        return i * i

    with pool.threads(2):
        assert pool.parallel_map(task, range(10), weights=[pool.POOL_BYTES] * 10) == [i * i for i in range(10)]
    assert len(seen) == 2


def test_small_work_stays_in_the_caller() -> None:
    here = threading.get_ident()
    with pool.threads(2):
        assert pool.parallel_map(lambda _: threading.get_ident(), range(4), weights=[1] * 4) == [here] * 4


def test_the_first_error_in_order_is_raised() -> None:
    def fail(i: int) -> int:
        raise ValueError(str(i))

    with pool.threads(1), pytest.raises(ValueError, match=r"^0$"):
        pool.parallel_map(fail, range(5), weights=[1] * 5)


def test_progress_counts_weights() -> None:
    told = []
    with pool.progress(lambda done, total: told.append((done, total))):
        pool.parallel_map(str, [1, 2], weights=[3, 4])
    assert told == [(3, 7), (7, 7)]
