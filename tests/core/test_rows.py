from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from loratools.core.rows import row_ranges, rowwise, slice_rows
from loratools.core.update import KINDS, Leaf
from loratools.io.base import Base
from loratools.kinds.dora import Dora
from loratools.kinds.lowrank import LowRank

EPS = float(np.finfo(np.float32).eps)


@pytest.mark.parametrize("kind", list(KINDS))
def test_rows_of_the_whole_are_the_whole_of_the_rows(kind: str) -> None:
    u = KINDS[kind].example(3)
    rows = rowwise(u)
    if rows is None:
        return
    w = np.random.default_rng(0).standard_normal(u.shape).astype(np.float32)
    whole = u.apply(w)
    for start, stop in ((0, 1), (1, u.shape[0]), (0, u.shape[0])):
        part = rows(start, stop)
        assert part.shape == (stop - start, *u.shape[1:])
        # the same sums in blocks of another size
        assert np.abs(part.apply(w[start:stop]) - whole[start:stop]).max() <= 16 * EPS * np.abs(whole).max()


def test_some_updates_have_no_rows_of_their_own() -> None:
    u = LowRank.example(0)
    assert rowwise(Dora(u, np.ones(7, np.float32), axis=1)) is None
    assert rowwise(Dora(u, np.ones(5, np.float32))) is not None


def test_nothing_is_read_before_the_first_rows() -> None:
    def refuse(out: object) -> object:
        raise AssertionError("read")

    rowwise(LowRank(Leaf((5, 2), "float32", refuse), Leaf((2, 7), "float32", refuse)))


def test_stored_rows_are_read_alone(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    import os

    w = np.arange(60, dtype=np.float16).reshape(10, 6)
    save_file({"w": w}, tmp_path / "model.safetensors")
    leaf = Base.open(tmp_path).leaf("w")
    leaf.rows(0, 1).read()
    sizes, read = [], os.preadv

    def seen(fd: int, buffers: list[memoryview], offset: int) -> int:
        sizes.append(sum(map(len, buffers)))
        return read(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", seen)
    assert np.array_equal(leaf.rows(3, 5).read(), w[3:5])
    assert np.array_equal(slice_rows(w, 3, 5), w[3:5])
    assert sizes == [2 * 6 * 2]


def test_ranges_cover_every_row_once() -> None:
    w = np.zeros((10, 6), np.float32)
    assert row_ranges(w, 50) == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10)]
    assert row_ranges(w, 1) == [(i, i + 1) for i in range(10)]
    assert row_ranges(w, 10**9) == [(0, 10)]
