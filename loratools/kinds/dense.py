"""Dense: an update stored whole, D = scale * d."""

from __future__ import annotations

from typing import Self

from loratools.core import generic
from loratools.core.rows import Rows, rowwise, slice_rows
from loratools.core.update import Array, Delta, Leaf, kind, namespace, shape_of, working_dtype
from loratools.errors import UsageError
from loratools.linalg import seeds
from loratools.linalg.factored import SVD
from loratools.linalg.namespace import up


@kind("dense")
class Dense(Delta):
    """D = scale * d, of any shape: bias differences, full differences."""

    d: Leaf | Array
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the base parameter."""
        return shape_of(self.d)

    def dense(self) -> Array:
        """Return scale * d, at least fp32."""
        return self.scale * up(self.d, working_dtype(self.d))

    def _matrix(self, dtype: str) -> Array:
        return self.scale * up(self.d, dtype).reshape(self.matrix_shape)

    def matmul(self, x: Array) -> Array:
        """Return D x; O(m n k)."""
        dtype = working_dtype(self.d, x)
        return self._matrix(dtype) @ up(x, dtype)

    def rmatmul(self, y: Array) -> Array:
        """Return D^T y; O(m n k)."""
        dtype = working_dtype(self.d, y)
        return (up(y, dtype).T @ self._matrix(dtype)).T

    @classmethod
    def example(cls, seed: int) -> Self:
        """A 5 x 7 difference, scaled by 2."""
        return cls(seeds.uniform(seeds.key_of(seed, "dense"), 5, 7) - 0.5, 2.0)


@generic.transposed.register(Dense)
def _(u: Dense) -> Dense:
    return Dense(u.d.T, u.scale)


@generic.svd.register(Dense)
def _(u: Dense, k: int, *, seed: int = 0) -> SVD:
    if not 1 <= k <= min(u.matrix_shape):
        raise UsageError("too many singular triplets asked for", expected=f"1 to {min(u.matrix_shape)}", got=k)
    x = up(u.dense(), "float64")
    left, s, right = namespace(x).linalg.svd(x.reshape(u.matrix_shape), full_matrices=False)
    return SVD(left[:, :k], s[:k], right[:k, :])


@rowwise.register(Dense)
def _(u: Dense) -> Rows:
    return lambda start, stop: Dense(slice_rows(u.d, start, stop), u.scale)
