from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.errors import UsageError
from loratools.linalg import select

SPECTRA = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12).map(lambda v: sorted(v, reverse=True))


def test_rank_for_energy_by_hand(array):
    s = array([3.0, 1.0])  # energies 9 and 1
    assert [select.rank_for_energy(s, e) for e in (1e-9, 0.5, 0.9, 0.9001, 1.0)] == [1, 1, 1, 2, 2]


def test_rank_for_error_by_hand(array):
    s = array([4.0, 2.0, 2.0, 1.0])  # tails 25, 9, 5, 1, 0 of 25
    assert [select.rank_for_error(s, e) for e in (0.0, 0.199, 0.2, 0.44, 0.45, 0.6, 0.999)] == [4, 4, 3, 3, 2, 1, 1]


def test_energy_one_and_error_zero_give_the_numerical_rank(array):
    s = array([1.0, 1e-3, 1e-6, 1e-8, 0.0])
    assert select.numerical_rank(s) == select.rank_for_energy(s, 1.0) == select.rank_for_error(s, 0.0) == 3
    assert select.numerical_rank(s, rtol=1e-9) == 4


def test_small_tails_are_not_lost_in_the_sum(array):
    s = array([1.0, 1e-9, 1e-9])  # 1 + 1e-18 = 1 in fp64
    assert select.rank_for_error(s, 1.2e-9) == 2
    assert select.tail_error(s, 1) == pytest.approx(2**0.5 * 1e-9, rel=1e-12)


def test_the_zero_spectrum_keeps_one(array):
    s = array([0.0, 0.0])
    assert select.rank_for_energy(s, 0.5) == select.rank_for_error(s, 0.5) == select.numerical_rank(s) == 1
    assert select.energy_kept(s, 1) == 1.0
    assert select.tail_error(s, 1) == 0.0


@pytest.mark.parametrize("magnitude", [1e-200, 1e200])
def test_squares_stay_in_range(array, magnitude):
    s = array(np.array([3.0, 1.0]) * magnitude)
    assert select.rank_for_energy(s, 0.91) == 2
    assert select.tail_error(s, 1) == pytest.approx(0.1**0.5, rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(SPECTRA, st.floats(1e-6, 1 - 1e-9))
def test_rank_for_energy_is_the_smallest_that_suffices(array, values, energy):
    k, energies = select.rank_for_energy(array(values), energy), np.cumsum(np.square(values))
    slack = 1e-13 * energies[-1]  # 12 roundings of eps each, with room
    assert energies[k - 1] >= energy * energies[-1] - slack
    assert k == 1 or energies[k - 2] < energy * energies[-1] + slack


@settings(max_examples=30, deadline=None)
@given(SPECTRA, st.floats(1e-6, 1 - 1e-9))
def test_rank_for_error_is_the_smallest_that_suffices(array, values, error):
    s = array(values)
    k = select.rank_for_error(s, error)
    assert select.tail_error(s, k) <= error * (1 + 1e-13)
    assert k == 1 or select.tail_error(s, k - 1) > error * (1 - 1e-13)


@settings(max_examples=30, deadline=None)
@given(SPECTRA, st.data())
def test_kept_energy_and_error_are_two_views_of_one_cut(array, values, data):
    k, s = data.draw(st.integers(0, len(values))), array(values)
    assert select.energy_kept(s, k) + select.tail_error(s, k) ** 2 == pytest.approx(1.0, abs=1e-14)
    assert select.tail_error(s, k) == pytest.approx(np.linalg.norm(values[k:]) / np.linalg.norm(values), abs=1e-14)


@pytest.mark.parametrize("energy", [0.0, -0.1, 1.0001, float("nan")])
def test_energy_outside_its_range_is_refused(array, energy):
    with pytest.raises(UsageError, match="energy is a share"):
        select.rank_for_energy(array([1.0]), energy)


@pytest.mark.parametrize("error", [1.0, -0.1, float("nan")])
def test_error_outside_its_range_is_refused(array, error):
    with pytest.raises(UsageError, match="error is relative"):
        select.rank_for_error(array([1.0]), error)
