"""Fourier: an update with a few frequencies, as FourierFT stores it (arXiv:2405.03003)."""

from __future__ import annotations

from math import pi
from typing import Self

from loratools.core import generic
from loratools.core.routes import route
from loratools.core.update import Array, Delta, Update, kind, namespace, shape_of
from loratools.errors import MismatchError
from loratools.kinds.dense import Dense
from loratools.kinds.lowrank import LowRank, low_rank
from loratools.kinds.spectral import Spectral
from loratools.linalg import seeds
from loratools.linalg.namespace import cast, device_of, ifft, up, working_dtype


@kind("fourier")
class Fourier(Spectral):
    """D = scale * Re ifft2(S), with ``spectrum`` (real) at (``rows``, ``columns``) of S; ifft2 divides by m n.

    Its rank is at most twice the number of rows, and of columns, that hold a coefficient.
    """

    def forward(self, coefficients: Array, size: int) -> Array:
        """Return the inverse Fourier transform of columns."""
        return ifft(coefficients, axis=0)

    def adjoint(self, x: Array, size: int) -> Array:
        """Return the same transform: its matrix is symmetric."""
        return ifft(x, axis=0)

    def count(self, size: int) -> int:
        """Return the size: as many frequencies as entries."""
        return size

    def factored(self) -> LowRank:
        """Return exact factors: the cosines and sines of the rows (or columns) with coefficients, times their waves."""
        places, s, by_row = self.thin()
        (m, n), xp = (self.shape if by_row else self.shape[::-1]), namespace(s)
        waves = self.forward(xp.matrix_transpose(s), n)  # (n, places)
        angle = _angles(places, m, like=s)
        b = xp.concat([xp.cos(angle), xp.sin(angle)], axis=1)
        a = xp.concat([xp.real(waves), -xp.imag(waves)], axis=1).T
        b, a = cast(b, working_dtype(s)), a * (self.scale / m)
        return LowRank(b, a) if by_row else LowRank(a.T, b.T)

    @classmethod
    def example(cls, seed: int) -> Self:
        """Two frequencies in a 5 x 7 update, scaled by 30."""
        v = seeds.uniform(seeds.key_of(seed, "fourier"), 2, 1)[:, 0] + 0.5
        xp = namespace(v)
        return cls(v, xp.asarray([1, 4]), xp.asarray([0, 3]), (5, 7), 30.0)


def _angles(places: Array, size: int, like: Array) -> Array:
    """Return 2 pi (place * j mod size) / size for j < size, (size, places), fp64: the integers lose nothing."""
    xp = namespace(places)
    turns = (xp.arange(size, dtype=xp.int64, device=device_of(places))[:, None] * places[None, :]) % size
    return cast(turns, "float64") * (2 * pi / size)


@low_rank.register(Fourier)
def _(u: Fourier) -> LowRank | None:
    """The exact factors where they are smaller than the update."""
    return u.factored() if 2 * shape_of(u.spectrum)[0] < min(u.shape) else None


@generic.inner.register(Fourier)
def _(u: Fourier, v: Delta) -> float:
    """Parseval's theorem between two of a kind: O(n log n)."""
    if not isinstance(v, Fourier):
        return float(generic.inner.dispatch(Update)(u, v))
    if u.shape != v.shape:
        raise MismatchError("inner product of different shapes", expected=u.shape, got=v.shape)
    mine, values = _even(u)
    other, others = _even(v)
    xp = namespace(values)
    order = xp.argsort(other)
    other = xp.take(other, order)
    sums = xp.cumulative_sum(xp.take(others, order), include_initial=True)
    there = xp.take(sums, xp.searchsorted(other, mine, side="right")) - xp.take(sums, xp.searchsorted(other, mine))
    return float(xp.sum(values * there)) / (u.shape[0] * u.shape[1])


def _even(u: Fourier) -> tuple[Array, Array]:
    """Return flat places and values, fp64, of the even part of S, whose transform is D; places may repeat."""
    rows, columns = u.places()
    (m, n), xp = u.shape, namespace(rows)
    half = up(u.spectrum, "float64") * (0.5 * u.scale)
    return xp.concat([rows * n + columns, (-rows % m) * n + (-columns % n)]), xp.concat([half, half])


@generic.transposed.register(Fourier)
def _(u: Fourier) -> Fourier:
    return u.transposed()


@route(Fourier, LowRank, cost=4.0)
def _waves(u: Fourier) -> Update:
    return u.factored()


@route(Fourier, Dense, cost=10.0)
def _form(u: Fourier) -> Update:
    return Dense(u.dense())
