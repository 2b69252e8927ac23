from __future__ import annotations

import numpy as np
import pytest
from fbpca import pca
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.errors import UsageError
from loratools.linalg import rsvd as room
from loratools.linalg.namespace import dtype_name, to_numpy, up
from loratools.linalg.rsvd import range_finder, rsvd
from loratools.linalg.seeds import key_of

J = np.arange(1, 121)
SPECTRA = {
    "1/j": 1.0 / J,
    "1/sqrt j": 1.0 / np.sqrt(J),
    "10^(-j/10)": 10.0 ** (-J / 10),
    "flat after a gap": np.where(J <= 8, 1.0, 0.5),
}
KEY = key_of(0, "test")


def with_spectrum(s, m=160, n=120, seed=0):
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((d, len(s))))[0] for d in (m, n))
    return u * s @ v.T


def error(x, found) -> float:
    u, s, vh = (to_numpy(up(part, "float64")) for part in found)
    return float(np.linalg.norm(x - u * s @ vh))


class Counting:
    """An operator that knows products only, and counts them."""

    def __init__(self, x):
        self.like, self.calls = x, 0

    @property
    def shape(self):
        return tuple(self.like.shape)

    def matmul(self, x):
        self.calls += 1
        return self.like @ x

    def rmatmul(self, y):
        self.calls += 1
        return self.like.mT @ y


@pytest.mark.parametrize("name", SPECTRA)
def test_the_default_is_close_to_optimal(array, name):
    x = with_spectrum(SPECTRA[name])
    best = np.linalg.norm(SPECTRA[name][8:])
    found = rsvd(array(x), 8, key=KEY)
    assert error(x, found) <= 1.01 * best
    assert error(x, rsvd(array(x), 8, power=6, key=KEY)) <= 1.001 * best
    u, s, vh = map(to_numpy, found)
    assert (np.diff(s) <= 0).all()
    assert (s <= SPECTRA[name][:8] * (1 + 1e-12)).all()  # projections never enlarge singular values
    assert np.abs(u.T @ u - np.eye(8)).max() < 100 * 2.2e-16
    assert np.abs(vh @ vh.T - np.eye(8)).max() < 100 * 2.2e-16


def test_three_witnesses_on_an_exactly_low_rank_matrix(array):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((90, 6)) @ rng.standard_normal((6, 70))
    found = rsvd(array(x), 6, power=0, key=KEY)
    dense = np.linalg.svd(x, compute_uv=False)
    assert error(x, found) < 1000 * 2.2e-16 * dense[0]  # exact up to rounding: the sketch holds the whole range
    assert np.abs(to_numpy(found.s) - dense[:6]).max() < 1000 * 2.2e-16 * dense[0]
    assert np.abs(to_numpy(found.s) - pca(x, k=6, raw=True, n_iter=2)[1]).max() < 1000 * 2.2e-16 * dense[0]
    diagonal = np.zeros((5, 4))
    diagonal[[0, 1, 2], [2, 0, 1]] = [3, -2, 1]  # closed form: 3, 2, 1, 0
    assert np.abs(to_numpy(rsvd(array(diagonal), 4, key=KEY).s) - [3, 2, 1, 0]).max() < 100 * 2.2e-16


def test_signs_sketch_as_well_as_gaussians(monkeypatch):
    """Over 40 sketches without power steps, where the test matrix matters most, the mean errors agree within 2 %."""
    x = with_spectrum(SPECTRA["1/sqrt j"])

    def mean_error():
        return np.mean([np.linalg.norm(x - q @ (q.T @ x)) for q in sketches()])

    def sketches():
        for seed in range(40):
            yield range_finder(x, 8, power=0, key=key_of(seed, "x"))

    with_signs = mean_error()
    monkeypatch.setattr(
        room, "signs", lambda key, n, width, like: np.random.default_rng(key).standard_normal((n, width))
    )
    assert with_signs <= 1.02 * mean_error()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.data())
def test_shapes_and_bounds(array, m, n, data):
    k = data.draw(st.integers(1, min(m, n)))
    x = np.random.default_rng(m * 100 + n).standard_normal((m, n))
    found = rsvd(array(x), k, key=KEY)
    assert [tuple(part.shape) for part in found] == [(m, k), (k,), (k, n)]
    tail = np.linalg.norm(np.linalg.svd(x, compute_uv=False)[k:])
    # 10 more columns than k and 2 power steps; where k + 10 >= min(m, n) the result is exact
    slack = 1e-12 if k + 10 >= min(m, n) else 0.1 * tail
    assert tail - 1e-12 <= error(x, found) <= tail + slack


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_short_inputs_give_fp32_vectors_and_fp64_values(array, dtype):
    x = array(with_spectrum(SPECTRA["10^(-j/10)"][:60], 60, 130), dtype)
    found = rsvd(x, 5, key=KEY)
    assert [dtype_name(part) for part in found] == ["float32", "float64", "float32"]
    dense = to_numpy(up(x, "float64"))
    s = np.linalg.svd(dense, compute_uv=False)
    assert error(dense, found) <= np.linalg.norm(s[5:]) + 1e-5 * s[0]
    u, vh = to_numpy(found.u).astype(float), to_numpy(found.vh).astype(float)
    assert np.abs(u.T @ u - np.eye(5)).max() < 10 * 1.2e-7
    assert np.abs(vh @ vh.T - np.eye(5)).max() < 10 * 1.2e-7


def test_an_operator_equals_its_matrix_at_the_promised_number_of_products(array):
    x = array(with_spectrum(SPECTRA["1/j"]))
    op = Counting(x)
    assert np.array_equal(to_numpy(rsvd(op, 4, power=3, key=KEY).u), to_numpy(rsvd(x, 4, power=3, key=KEY).u))
    assert op.calls == 2 * 3 + 2


def test_a_batch_equals_a_loop(array):
    x = np.random.default_rng(0).standard_normal((3, 30, 25))
    whole = rsvd(array(x), 4, key=KEY)
    for i in range(3):
        one = rsvd(array(x[i]), 4, key=KEY)
        for many, single in zip(whole, one, strict=True):
            assert np.abs(to_numpy(many)[i] - to_numpy(single)).max() < 1e-10  # rounding / gap of the spectrum


def test_the_key_decides(array):
    x = array(with_spectrum(SPECTRA["1/j"]))
    first, same, other = (to_numpy(rsvd(x, 4, key=key_of(seed, "x")).u) for seed in (0, 0, 1))
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)


def test_both_libraries_use_the_same_sketch(array):
    x = with_spectrum(SPECTRA["1/j"])
    q, want = to_numpy(range_finder(array(x), 6, key=KEY)), range_finder(x, 6, key=KEY)
    assert np.abs(q @ q.T - want @ want.T).max() < 1e-11


def test_the_zero_matrix(array):
    u, s, vh = map(to_numpy, rsvd(array(np.zeros((9, 8))), 3, key=KEY))
    assert not s.any()
    assert np.abs(u.T @ u - np.eye(3)).max() < 1e-14
    assert np.abs(vh @ vh.T - np.eye(3)).max() < 1e-14


@pytest.mark.parametrize("k", [0, 6])
def test_ranks_outside_are_refused(array, k):
    with pytest.raises(UsageError, match="no such sketch"):
        rsvd(array(np.ones((5, 7))), k, key=KEY)
