from __future__ import annotations

import numpy as np
import pytest

from loratools.errors import FormatError, MismatchError, NumericsError
from loratools.kinds.dora import Dora, refitted
from loratools.kinds.lowrank import LowRank

RNG = np.random.default_rng(5)


def low_rank(m: int = 6, r: int = 3, n: int = 8) -> LowRank:
    return LowRank(RNG.standard_normal((m, r)), RNG.standard_normal((r, n)), 0.5)


def test_rows_get_the_stored_magnitude() -> None:
    w, m = RNG.standard_normal((6, 8)), RNG.random(6) + 0.5
    out = Dora(low_rank(), m).apply(w)
    assert np.allclose(np.linalg.norm(out, axis=1), m, rtol=1e-12)


def test_axis_one_is_the_transposed_storage() -> None:
    u, m, w = low_rank(), RNG.random(6) + 0.5, RNG.standard_normal((6, 8))
    turned = Dora(LowRank(u.a.T, u.b.T, u.scale), m, axis=1)
    assert np.allclose(turned.apply(w.T), Dora(u, m).apply(w).T, rtol=1e-12)


def test_convolution_norms_run_over_all_other_axes() -> None:
    u = LowRank(RNG.standard_normal((4, 2)), RNG.standard_normal((2, 18)), 1.0, (4, 2, 3, 3))
    m, w = RNG.random(4) + 0.5, RNG.standard_normal((4, 2, 3, 3))
    assert np.allclose(np.linalg.norm(Dora(u, m).apply(w).reshape(4, 18), axis=1), m, rtol=1e-12)


def test_delta_near_gain_one_does_not_cancel() -> None:
    """With |g - 1| ~ 1e-9 in fp64 the difference of two nearly equal matrices would lose nine digits."""
    w, u = RNG.standard_normal((6, 8)), low_rank()
    v = w + u.dense()
    gain = 1 + 1e-9 * RNG.standard_normal(6)
    d = Dora(u, gain * np.linalg.norm(v, axis=1)).delta(w).dense()
    exact = (gain - 1)[:, None] * w.astype(np.longdouble) + gain[:, None] * u.dense().astype(np.longdouble)
    assert np.abs(d - exact).max() <= 1e-14 * np.abs(v).max() * 8  # rounding of the norms, not of the difference


def test_refitted_magnitude_is_the_least_squares_one() -> None:
    w, m = RNG.standard_normal((6, 8)), RNG.random(6) + 0.5
    old = Dora(low_rank(), m)
    new = refitted(old, Dora(low_rank(), m), w)
    target, v = old.apply(w), w + new.direction.dense()
    unit = v / np.linalg.norm(v, axis=1, keepdims=True)
    assert np.allclose(new.magnitude, (target * unit).sum(axis=1), rtol=1e-12)
    assert np.linalg.norm(new.apply(w) - target) <= np.linalg.norm(Dora(new.direction, m).apply(w) - target)


def test_refuses_what_it_cannot_apply() -> None:
    with pytest.raises(FormatError, match="magnitude does not fit"):
        Dora(low_rank(), np.ones(5))
    u = Dora(low_rank(), np.ones(6))
    with pytest.raises(MismatchError):
        u.apply(None)
    with pytest.raises(MismatchError):
        u.apply(np.ones((8, 6)))
    with pytest.raises(NumericsError, match="row of W"):
        u.apply(-u.direction.dense())
