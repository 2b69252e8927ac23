"""Wavelet: an update with a few wavelet coefficients, as WaveFT stores it (arXiv:2505.12532)."""

from __future__ import annotations

from typing import Self

from loratools.core import generic
from loratools.core.routes import route
from loratools.core.update import Array, Update, kind, namespace, shape_of
from loratools.errors import FormatError
from loratools.kinds.dense import Dense
from loratools.kinds.lowrank import LowRank, low_rank
from loratools.kinds.spectral import Spectral
from loratools.linalg import seeds, wavelets


@kind("wavelet")
class Wavelet(Spectral):
    """D = scale * U_m S U_n^T, one level of synthesis on both sides with the low-pass filter ``taps``.

    Coefficients of either side are numbered low ones first (``linalg/wavelets.py``). Its rank is at most the number of
    rows, and of columns, that hold a coefficient.
    """

    taps: tuple[float, ...] = wavelets.LOW_PASS["db1"]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "taps", tuple(float(tap) for tap in self.taps))
        if len(self.taps) < 2 or len(self.taps) % 2:
            raise FormatError("a wavelet has an even number of taps", got=len(self.taps))

    def forward(self, coefficients: Array, size: int) -> Array:
        """Return the synthesis of columns."""
        return wavelets.synthesis(coefficients, self.taps, size)

    def adjoint(self, x: Array, size: int) -> Array:
        """Return the analysis of columns."""
        return wavelets.analysis(x, self.taps)

    def count(self, size: int) -> int:
        """Return the number of coefficients: a little above the size, for the borders."""
        return wavelets.count(size, self.taps)

    def factored(self) -> LowRank:
        """Return exact factors: the atoms of the rows (or columns) with coefficients, times what they carry."""
        places, s, by_row = self.thin()
        (m, n), xp = (self.shape if by_row else self.shape[::-1]), namespace(s)
        chosen = xp.zeros((self.count(m), places.shape[0]), dtype=s.dtype, device=s.device)
        chosen[places, xp.arange(places.shape[0])] = 1.0
        b, a = self.forward(chosen, m), self.forward(xp.matrix_transpose(s), n).T
        return LowRank(b, a, self.scale) if by_row else LowRank(a.T, b.T, self.scale)

    @classmethod
    def example(cls, seed: int) -> Self:
        """Three coefficients of a 6 x 7 update in the wavelet db2, scaled by 2."""
        v = seeds.uniform(seeds.key_of(seed, "wavelet"), 3, 1)[:, 0] + 0.5
        xp = namespace(v)
        return cls(v, xp.asarray([0, 5, 5]), xp.asarray([3, 1, 9]), (6, 7), 2.0, wavelets.LOW_PASS["db2"])


@low_rank.register(Wavelet)
def _(u: Wavelet) -> LowRank | None:
    """The exact factors where they are smaller than the update."""
    return u.factored() if shape_of(u.spectrum)[0] < min(u.shape) else None


@generic.transposed.register(Wavelet)
def _(u: Wavelet) -> Wavelet:
    return u.transposed()


@route(Wavelet, LowRank, cost=4.0)
def _atoms(u: Wavelet) -> Update:
    return u.factored()


@route(Wavelet, Dense, cost=10.0)
def _form(u: Wavelet) -> Update:
    return Dense(u.dense())
