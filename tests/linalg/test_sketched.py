"""Randomised truncation of a product: against the optimum, its error against the dense one."""

from __future__ import annotations

import numpy as np
import pytest

from loratools.errors import NumericsError
from loratools.linalg import factored, sketched
from loratools.linalg.namespace import to_numpy
from loratools.linalg.seeds import key_of

KEY = key_of(0, "test")


def decaying(rng, m, n, r, power):
    q, _ = np.linalg.qr(rng.standard_normal((m, r)))
    p, _ = np.linalg.qr(rng.standard_normal((n, r)))
    return q * np.arange(1, r + 1) ** -power, p.T


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("scale", [1.0, -2.0])
def test_error_is_measured_and_near_the_optimum(array, power, scale):
    b, a = decaying(np.random.default_rng(0), 90, 70, 48, power)
    found = sketched.truncate(array(b), array(a), lambda s: 8, key=KEY, scale=scale)
    dense = scale * b @ a
    error = np.linalg.norm(dense - to_numpy(found.b) @ to_numpy(found.a)) / np.linalg.norm(dense)
    best = factored.truncate(array(b), array(a), lambda s: 8, scale=scale).error
    assert found.error == pytest.approx(error, rel=1e-7)
    assert best <= found.error * (1 + 1e-9)
    assert found.error <= 1.003 * best  # 0.3% at two power iterations on slow spectra: see linalg/rsvd.py
    assert found.energy == pytest.approx(1 - error**2)
    left, right = to_numpy(found.b), to_numpy(found.a)
    assert np.allclose(left.T @ left, right @ right.T, atol=1e-9)  # balanced
    assert float((found.singular_values**2).sum()) == pytest.approx(np.linalg.norm(dense) ** 2, rel=1e-9)


def test_exact_where_the_sketch_holds_everything(array):
    rng = np.random.default_rng(1)
    b, a = rng.standard_normal((40, 12)), rng.standard_normal((12, 30))
    found = sketched.truncate(array(b), array(a), lambda s: 4, key=KEY)
    assert found.error == pytest.approx(factored.truncate(array(b), array(a), lambda s: 4).error, rel=1e-9)
    assert sketched.truncate(array(b), array(a), lambda s: 50, key=KEY).rank == 12


def test_seeds_zero_and_bad_values(array):
    b, a = decaying(np.random.default_rng(2), 60, 50, 40, 0.5)
    one, two = (sketched.truncate(array(b), array(a), lambda s: 3, key=KEY) for _ in range(2))
    assert np.array_equal(to_numpy(one.b), to_numpy(two.b))
    other = sketched.truncate(array(b), array(a), lambda s: 3, key=key_of(1, "test"))
    assert not np.array_equal(to_numpy(one.b), to_numpy(other.b))
    zero = sketched.truncate(array(np.zeros((5, 3))), array(np.ones((3, 6))), lambda s: 2, key=KEY)
    assert (zero.error, zero.energy) == (0.0, 1.0)
    assert not to_numpy(zero.b).any()
    assert (np.linalg.norm(to_numpy(zero.a), axis=1) > 0.5).all()
    with pytest.raises(NumericsError):
        sketched.truncate(array(np.full((5, 3), np.nan)), array(np.ones((3, 6))), lambda s: 2, key=KEY)
