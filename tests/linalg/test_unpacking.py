"""Decoding: whatever way is taken, the bits of the textbook, for every size, level book, group, dtype and length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes  # noqa: F401 - registers bfloat16 by name
import numpy as np
import pytest

from loratools.errors import FormatError
from loratools.linalg import unpacking
from loratools.linalg.bits import row_bytes, unpack
from loratools.linalg.levels import BITS, EVEN_BOOK, GAUSS_BOOK, HALF, levels
from loratools.linalg.namespace import to_numpy
from loratools.linalg.scales import groups
from loratools.linalg.unpacking import textbook, values

Library = Callable[[Any], Any]


def stored(bits: int, count: int, group: int, rows: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Return packed rows and scales: zeros, negative ones, fp16's smallest among them."""
    rng = np.random.default_rng(bits * count + group)
    packed = rng.integers(0, 256, (rows, row_bytes(count, bits)), dtype=np.uint8)
    if bits == HALF:
        packed = rng.standard_normal((rows, count)).astype(np.float16).view(np.uint8)
    scale = rng.standard_normal((rows, groups(count, group))).astype(np.float16).astype(np.float32)
    scale[:4, 0] = 0, -1, 2.0**-24, 10
    return packed, scale


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("group", [0, 24, 128, 700])
@pytest.mark.parametrize("bits", [*BITS, HALF])
def test_the_bits_are_those_of_the_textbook(bits: int, group: int, dtype: str, library: Library) -> None:
    for count in (1, 7, 300, 1100, 5000):
        packed, scale = (library(x) for x in stored(bits, count, group))
        for book in (GAUSS_BOOK, EVEN_BOOK) if bits < HALF else (GAUSS_BOOK,):
            how: dict[str, Any] = {"group": group, "book": book, "dtype": dtype}
            want = to_numpy(textbook(packed, scale, bits, count, **how))
            got = np.concatenate([to_numpy(part) for _, part in values(packed, scale, bits, count, **how)])
            assert got.dtype == want.dtype == np.dtype(dtype)
            assert got.tobytes() == np.ascontiguousarray(want).tobytes()


@pytest.mark.parametrize("bits", BITS)
def test_the_textbook_is_level_times_scale_rounded_once(bits: int) -> None:
    packed, scale = stored(bits, 37, 8)
    level = levels(bits, GAUSS_BOOK, packed)[unpack(packed, bits, 37)]
    want = (level * np.repeat(scale, 8, axis=1)[:, :37]).astype(np.float16)
    assert np.array_equal(textbook(packed, scale, bits, 37, group=8, book=GAUSS_BOOK, dtype="float16"), want)


def test_blocks_cover_all_rows_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "BLOCK", 100)
    packed, scale = stored(2, 40, 0, rows=9)
    found = list(values(packed, scale, 2, 40, group=0, book=GAUSS_BOOK, dtype="float32"))
    assert [i for i, _ in found] == [0, 2, 4, 6, 8]
    want = textbook(packed, scale, 2, 40, group=0, book=GAUSS_BOOK, dtype="float32")
    assert np.array_equal(np.concatenate([part for _, part in found]), want)


def test_other_lengths_are_refused() -> None:
    with pytest.raises(FormatError):
        next(values(np.zeros((2, 3), np.uint8), np.ones((2, 1), np.float32), 4, 7, group=0, book=0, dtype="float32"))
