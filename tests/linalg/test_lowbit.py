"""The encoder: known distortions, errors that are true, and that fall with bits, sweeps and scales."""

from __future__ import annotations

import numpy as np
import pytest

from loratools.kinds.packed import packed
from loratools.linalg.levels import HALF
from loratools.linalg.lowbit import LowBit, encode


def components(m: int, n: int, k: int, seed: int = 0, power: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    s = np.arange(1, k + 1) ** -power
    q, _ = np.linalg.qr(rng.standard_normal((m, k)))
    p, _ = np.linalg.qr(rng.standard_normal((n, k)))
    return (q * np.sqrt(s)).astype(np.float32), (np.sqrt(s)[:, None] * p.T).astype(np.float32)


def true_error(found: LowBit, b: np.ndarray, a: np.ndarray, q: np.ndarray | None = None) -> float:
    d = (b.astype(np.float64) @ a) * (1 if q is None else q)
    return float(((packed(found, d.shape).dense() * (1 if q is None else q) - d) ** 2).sum() / (d**2).sum())


@pytest.mark.parametrize(
    "bits",
    [(1,) * 6, (2,) * 6, (8,) * 6, (HALF, 8, 5, 3, 1, 1), (HALF,) * 6, (7, 6, 6, 4, 2, 1), (12, 11, 10, 9, 8, 1)],
)
@pytest.mark.parametrize("group", [0, 16])
def test_the_error_is_that_of_what_is_stored(bits: tuple[int, ...], group: int) -> None:
    b, a = components(70, 51, 6)
    found = encode(b, a, bits, group=group)
    assert found.error == pytest.approx(true_error(found, b, a), rel=1e-2, abs=1e-6)


def test_one_bit_of_a_gaussian_pair_keeps_two_over_pi_squared() -> None:
    """One component: nothing to mend it with. Each side keeps 2/pi, the pair (2/pi)^2 = 0.405; at n = 2e5 +- 0.003."""
    rng = np.random.default_rng(0)
    b, a = rng.standard_normal((200_000, 1)).astype(np.float32), rng.standard_normal((1, 200_000)).astype(np.float32)
    found = encode(b, a, (1,))
    assert found.error == pytest.approx(1 - (2 / np.pi) ** 2, abs=0.003)


@pytest.mark.parametrize(("bits", "distortion"), [(2, 0.1175), (3, 0.0345), (4, 0.0095), (8, 4.1e-5)])
def test_lloyd_max_of_a_gaussian_pair(bits: int, distortion: float) -> None:
    rng = np.random.default_rng(1)
    b, a = rng.standard_normal((100_000, 1)).astype(np.float32), rng.standard_normal((1, 100_000)).astype(np.float32)
    found = encode(b, a, (bits,), book=0)
    assert found.error == pytest.approx(1 - (1 - distortion) ** 2, rel=0.05)


def test_sweeps_and_bits_never_raise_the_error() -> None:
    b, a = components(256, 300, 12)
    by_sweeps = [encode(b, a, (1,) * 12, sweeps=s).error for s in (0, 1, 2, 4, 20)]
    assert by_sweeps == sorted(by_sweeps, reverse=True)
    assert by_sweeps[-1] < 0.85 * by_sweeps[0]
    by_bits = [encode(b, a, (bits,) * 12).error for bits in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, HALF)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert by_bits[-4] < 0.01**2
    assert by_bits[-1] < 1e-6


def test_rotation_is_taken_only_where_it_helps() -> None:
    b, a = components(256, 300, 8, power=1.5)
    assert encode(b, a, (3,) * 8).error <= encode(b, a, (3,) * 8, rotate=False).error


def test_weights_lower_the_weighted_error() -> None:
    b, a = components(200, 160, 10)
    q = np.linspace(0.05, 3, 160).astype(np.float32)
    plain, seen = encode(b, a, (1,) * 10), encode(b, a, (1,) * 10, weights=q)
    assert true_error(seen, b, a, q) < true_error(plain, b, a, q)
    assert seen.error == pytest.approx(true_error(seen, b, a, q), rel=1e-2)


def test_outliers_and_zeros_do_no_harm() -> None:
    b, a = components(64, 64, 3)
    b[:, 2] = 0
    a[0, 5] = 1e3
    found = encode(b, a, (8, 8, 1))
    assert np.isfinite(found.error)
    assert np.all(np.isfinite(packed(found, (64, 64)).dense()))


def test_the_library_does_not_matter() -> None:
    torch = pytest.importorskip("torch")
    b, a = components(64, 48, 4)
    one = encode(b, a, (2, 2, 1, 1))
    two = encode(torch.from_numpy(b), torch.from_numpy(a), (2, 2, 1, 1))
    assert two.error == pytest.approx(one.error, rel=0.05)
