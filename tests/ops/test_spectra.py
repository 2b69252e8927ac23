"""Figures of spectra with known answers."""

from __future__ import annotations

from math import e, log

import numpy as np
import pytest

from loratools.ops.spectra import LISTED, energy_curve, numerical_rank, spectrum_figures, suggested_ranks


def test_equal_values_fill_their_rank() -> None:
    found = spectrum_figures([2.0] * 5)
    assert found["stable_rank"] == found["numerical_rank"] == 5
    assert found["effective_rank"] == pytest.approx(5, rel=1e-14)  # exp of a sum of five logs
    assert found["effective_rank_energy"] == pytest.approx(5, rel=1e-14)
    assert found["frobenius_norm"] == pytest.approx(20**0.5)
    assert found["spectral_norm"] == 2.0


def test_one_value_is_rank_one() -> None:
    found = spectrum_figures([3.0, 0.0, 0.0])
    assert found["stable_rank"] == found["effective_rank"] == found["effective_rank_energy"] == 1
    assert set(found["suggested_ranks"].values()) == {1}


def test_the_two_entropies_differ_as_defined() -> None:
    """s = (2, 1): shares 2/3, 1/3 of the sum, 4/5, 1/5 of the squares."""
    found = spectrum_figures([2.0, 1.0])
    assert found["effective_rank"] == pytest.approx(e ** -(2 / 3 * log(2 / 3) + 1 / 3 * log(1 / 3)))
    assert found["effective_rank_energy"] == pytest.approx(e ** -(0.8 * log(0.8) + 0.2 * log(0.2)))
    assert found["stable_rank"] == pytest.approx(1.25)


def test_zero_update() -> None:
    found = spectrum_figures([0.0, 0.0])
    assert {found[f] for f in ("stable_rank", "effective_rank", "numerical_rank", "frobenius_norm")} == {0}
    assert set(found["suggested_ranks"].values()) == {0}
    assert found["energy"] == [0.0, 0.0]
    assert spectrum_figures([])["numerical_rank"] == 0


def test_suggestions_follow_their_rules() -> None:
    s = [10.0, 5.0, 4.0, 0.1, 0.05, 0.0]
    found = suggested_ranks(s)
    curve = energy_curve(s)
    for share in (0.9, 0.95, 0.99):
        rank = found[f"energy_{share:g}"]
        assert curve[rank - 1] >= share
        assert rank == 1 or curve[rank - 2] < share
    assert found["gap"] == 3
    assert found["stable"] == 2  # 141.01 / 100
    assert numerical_rank(s) == 5


def test_the_list_is_capped_and_the_figures_are_not() -> None:
    s = list(np.linspace(2, 1, 1000))
    found = spectrum_figures(s)
    assert len(found["singular_values"]) == len(found["energy"]) == LISTED
    assert found["numerical_rank"] == 1000
