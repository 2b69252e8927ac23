"""Arrays that wait in a temporary file come back byte for byte."""

from __future__ import annotations

import threading

import ml_dtypes
import numpy as np
import pytest

from loratools.io.spool import Spool
from loratools.leaf import Leaf


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16, np.int64])
def test_what_comes_back_is_what_was_kept(dtype: type) -> None:
    x = np.arange(15).reshape(3, 5).astype(dtype)
    kept = Spool(0).keep(x)
    assert isinstance(kept, Leaf)
    assert (kept.shape, kept.dtype, kept.nbytes) == ((3, 5), np.dtype(dtype).name, x.nbytes)
    assert np.array_equal(kept.read(), x)
    assert np.array_equal(kept.T.read(), x.T)


def test_the_first_bytes_stay_in_memory() -> None:
    spool = Spool(100)
    x = np.zeros(10)
    assert spool.keep(x) is x
    assert isinstance(spool.keep(x), Leaf)  # 80 of 100 bytes are taken


def test_many_threads_keep_many_arrays() -> None:
    spool, kept = Spool(0), {}

    def work(i: int) -> None:
        kept[i] = spool.keep(np.full((50, i + 1), i))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(20)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(np.array_equal(leaf.read(), np.full((50, i + 1), i)) for i, leaf in kept.items())


def test_transposed_views_are_stored_row_by_row() -> None:
    x = np.arange(6.0).reshape(2, 3).T
    assert np.array_equal(Spool(0).keep(x).read(), x)
