"""Circulant: blocks that are circular convolutions, as C3A stores them (arXiv:2407.19342)."""

from __future__ import annotations

from typing import Self

from loratools.core import generic
from loratools.core.lazy import lazily
from loratools.core.routes import route
from loratools.core.update import Array, Delta, Leaf, Update, kind, namespace, shape_of, working_dtype
from loratools.errors import FormatError
from loratools.kinds.dense import Dense
from loratools.kinds.hadamard import thin
from loratools.kinds.lowrank import LowRank
from loratools.linalg import seeds
from loratools.linalg.namespace import fft, ifft, up


@kind("circulant")
class Circulant(Delta):
    """D[m b + j, n b + l] = scale * kernel[m, n, (l - j) mod b], of shape (p b, q b); ``kernel`` (p, q, b).

    Fourier transforms along both sides make it block-diagonal: one p x q matrix per frequency.
    """

    kernel: Leaf | Array
    scale: float = 1.0

    def __post_init__(self) -> None:
        if len(shape_of(self.kernel)) != 3:
            raise FormatError("a kernel of circulant blocks has three axes", got=shape_of(self.kernel))

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the base parameter."""
        p, q, b = shape_of(self.kernel)
        return p * b, q * b

    def matrices(self, dtype: str) -> Array:
        """Return the matrix (p, q) of every frequency, (b, p, q), complex."""
        k = self.scale * up(self.kernel, dtype)
        xp = namespace(k)
        return xp.permute_dims(xp.conj(fft(k, axis=2)), (2, 0, 1))

    def matmul(self, x: Array) -> Array:
        """Return D x; O((m + n) k log b + m n k / b)."""
        dtype = working_dtype(self.kernel, x)
        return _between(self.matrices(dtype), up(x, dtype))

    def rmatmul(self, y: Array) -> Array:
        """Return D^T y; as :meth:`matmul`."""
        dtype = working_dtype(self.kernel, y)
        matrices = self.matrices(dtype)
        xp = namespace(matrices)
        return _between(xp.conj(xp.matrix_transpose(matrices)), up(y, dtype))

    def dense(self) -> Array:
        """Return D in ``shape``, gathered."""
        k = self.scale * up(self.kernel, working_dtype(self.kernel))
        (p, q, b), xp = k.shape, namespace(k)
        steps = xp.arange(b, device=k.device)
        rolled = xp.take(k, ((steps[None, :] - steps[:, None]) % b).reshape(-1), axis=2).reshape(p, q, b, b)
        return xp.permute_dims(rolled, (0, 2, 1, 3)).reshape(p * b, q * b)

    @classmethod
    def example(cls, seed: int) -> Self:
        """Two by three blocks of size 3, scaled by 2."""
        return cls((seeds.uniform(seeds.key_of(seed, "circulant"), 6, 3) - 0.5).reshape(2, 3, 3), 2.0)


def _between(matrices: Array, x: Array) -> Array:
    """Return the real product of x (q b, k) with the block-circulant operator of these matrices (b, p, q)."""
    b, _, q = matrices.shape
    xp, k = namespace(matrices), x.shape[1]
    waves = xp.permute_dims(fft(x.reshape(q, b, k), axis=1), (1, 0, 2))
    back = ifft(matrices @ waves, axis=0)  # (b, p, k)
    return xp.real(xp.permute_dims(back, (1, 0, 2))).reshape(-1, k)


@generic.svdvals.register(Circulant)
def _(u: Circulant) -> Array:
    """Those of the matrices of all frequencies; O(m n min(p, q) / b) instead of O(m n min(m, n))."""
    matrices = u.matrices("float64")
    xp = namespace(matrices)
    return -xp.sort(-xp.linalg.svdvals(matrices).reshape(-1))


@generic.inner.register(Circulant)
def _(u: Circulant, v: Delta) -> float:
    """Between two of one cut, b times that of the kernels."""
    if isinstance(v, Circulant) and shape_of(v.kernel) == shape_of(u.kernel):
        x, y = up(u.kernel, "float64"), up(v.kernel, "float64")
        return float(u.scale * v.scale * x.shape[2] * (x * y).sum())
    return float(generic.inner.dispatch(Update)(u, v))


@generic.transposed.register(Circulant)
def _(u: Circulant) -> Circulant:
    p, q, b = shape_of(u.kernel)

    def turned(k: Array) -> Array:
        xp = namespace(k)
        back = xp.take(k, -xp.arange(b, device=k.device) % b, axis=2)
        return xp.permute_dims(back, (1, 0, 2))

    return Circulant(lazily(u.kernel, (q, p, b), turned), u.scale)


@route(Circulant, LowRank, cost=8.0)
def _thin(u: Circulant) -> Update:
    return thin(u)


@route(Circulant, Dense, cost=10.0)
def _form(u: Circulant) -> Update:
    return Dense(u.dense())
