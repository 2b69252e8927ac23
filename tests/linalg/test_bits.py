"""Packing: every size, every odd length, byte for byte as the reference unpacks it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from loratools.errors import FormatError
from loratools.linalg.bits import pack, row_bytes, unpack
from loratools.linalg.levels import EVEN_BOOK, GAUSS_BOOK, is_even, levels, nearest, snapped
from loratools.linalg.lloyd_max import GAUSS
from loratools.linalg.namespace import to_numpy, unpack_bits

Library = Callable[[Any], Any]


@pytest.mark.parametrize("bits", range(1, 13))
@pytest.mark.parametrize("count", [1, 7, 8, 9, 37, 64])
def test_round_trip_and_reference(bits: int, count: int, library: Library) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (3, count)).astype(np.uint8 if bits <= 8 else np.int32)
    packed = to_numpy(pack(library(codes), bits))
    assert packed.shape == (3, row_bytes(count, bits))
    assert np.array_equal(to_numpy(unpack(library(packed), bits, count)), codes)
    for row, want in zip(packed, codes, strict=True) if bits <= 8 else ():
        assert np.array_equal(unpack_bits(row, bits, count), want)


def test_other_lengths_are_refused() -> None:
    with pytest.raises(FormatError):
        unpack(np.zeros((2, 3), np.uint8), 4, 5 + 2)


@pytest.mark.parametrize("bits", range(2, 9))
def test_levels_are_the_centroids_of_their_cells(bits: int) -> None:
    """Lloyd's condition, to the five digits that the table holds: E[x | cell] = level for a unit Gaussian."""
    from scipy.stats import norm

    half = np.array(GAUSS[bits])
    edges = np.concatenate([[0.0], (half[1:] + half[:-1]) / 2, [np.inf]])
    mass = norm.sf(edges[:-1]) - norm.sf(edges[1:])
    assert np.abs((norm.pdf(edges[:-1]) - norm.pdf(edges[1:])) / mass - half).max() < 1e-4


@pytest.mark.parametrize("book", [GAUSS_BOOK, EVEN_BOOK])
@pytest.mark.parametrize("bits", range(1, 13))
def test_nearest_is_nearest_and_snapped_its_level(bits: int, book: int, library: Library) -> None:
    x = 2 * np.random.default_rng(0).standard_normal(500).astype(np.float32)
    x = x * (2.0 ** (bits - 2) if is_even(bits, book) else 1)
    table = to_numpy(levels(bits, book, library(x)))
    codes = to_numpy(nearest(library(x), bits, book))
    assert np.allclose(np.abs(table[codes] - x), np.abs(table[None, :] - x[:, None]).min(axis=1), atol=1e-6)
    assert np.array_equal(to_numpy(snapped(library(x), bits, book)), table[codes])


@pytest.mark.parametrize("bits", range(2, 9))
def test_nearest_counts_borders_as_searchsorted_does(bits: int, library: Library) -> None:
    """Also on the borders themselves, on the numbers beside them, far outside, and for infinity."""
    table = levels(bits, GAUSS_BOOK, np.zeros(1))
    borders = (table[1:] + table[:-1]) / 2
    beside = [np.nextafter(borders, np.float32(side)) for side in (-9, 9)]
    x = np.concatenate([borders, *beside, np.linspace(-9, 9, 4001), [np.inf, -np.inf, 0.0]]).astype(np.float32)
    assert np.array_equal(to_numpy(nearest(library(x), bits, GAUSS_BOOK)), np.searchsorted(borders, x))


def test_the_medians_are_those_of_the_papers_program() -> None:
    """500 rounds from zeros, as its ``QLinear.quantize`` runs them."""
    from scipy.stats import norm

    from loratools.linalg.medians import MEDIANS

    for bits, told in MEDIANS.items():
        values = np.zeros(2**bits)
        for _ in range(500):
            share = np.concatenate([[0], norm.cdf((values[1:] + values[:-1]) / 2), [1]])
            values = norm.ppf((share[1:] + share[:-1]) / 2)
        assert np.allclose(values[len(values) // 2 :], told, rtol=1e-6)
