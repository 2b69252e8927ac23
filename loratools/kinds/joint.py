"""Joint: the base in a basis shared by many layers, its coordinates replaced, as FRoD does (joint decomposition)."""

from __future__ import annotations

from dataclasses import replace
from typing import Self

from loratools.core.coat import Coat, loaded
from loratools.core.generic import transposed
from loratools.core.update import Array, Delta, Leaf, kind, namespace, shape_of, working_dtype
from loratools.errors import FormatError
from loratools.kinds.lowrank import LowRank
from loratools.kinds.sparse import Sparse
from loratools.linalg import seeds
from loratools.linalg.namespace import down, up

SMALL = 1e-12  # columns of the base's coordinates below this are none, as in PEFT


@kind("joint")
class Joint(Coat):
    """W' = U (S + diag(l)) V^T, where W = U diag(l0) V^T with unit columns of U: l0 and U follow from W and V (n, n).

    ``axis`` 0: the same of the transposed W.
    """

    basis: Leaf | Array
    diagonal: Leaf | Array
    rest: Delta
    shape: tuple[int, ...]
    axis: int = 1

    def __post_init__(self) -> None:
        n = self.shape[self.axis]
        sizes = shape_of(self.basis), shape_of(self.diagonal), self.rest.shape
        if len(self.shape) != 2 or sizes != ((n, n), (n,), (n, n)):
            got = f"V {shape_of(self.basis)}, l {shape_of(self.diagonal)}, S {self.rest.shape}"
            raise FormatError("the coordinates do not fit the basis", expected=f"{n} of each", got=got)

    def delta(self, w: Array) -> Delta:
        """Return U (S + diag(l - l0)) V^T as factors: nothing cancels near the base. O(m n^2 + n^3), in fp64."""
        base = self.checked(w)
        v, wide = up(self.basis, "float64"), up(base if self.axis else base.T, "float64")
        xp = namespace(wide)
        coordinates = xp.linalg.solve(v, wide.T).T
        size = xp.sqrt(xp.sum(coordinates * coordinates, axis=0))
        live = size > SMALL
        u = xp.where(live, coordinates / xp.where(live, size, 1.0), 0.0)
        b = loaded(self.rest, "float64").rmatmul(u.T).T + u * (up(self.diagonal, "float64") - size)
        dtype = working_dtype(base)
        b, a = down(b, dtype), down(v.T, dtype)
        return LowRank(b, a) if self.axis else LowRank(a.T, b.T)

    @classmethod
    def example(cls, seed: int) -> Self:
        """A 5 x 7 parameter in a random basis, nine of 49 coordinates and the diagonal changed."""
        v = seeds.uniform(seeds.key_of(seed, "joint"), 7, 7) - 0.5
        xp = namespace(v)
        inner = Sparse.example(seed)
        starts: Array = inner.rows
        rows = xp.concat([starts, starts[-1:], starts[-1:]])
        return cls(v + xp.eye(7), v[0, :] + 1.0, Sparse(rows, inner.columns, inner.values, (7, 7)), (5, 7))


@transposed.register(Joint)
def _(u: Joint) -> Joint:
    return replace(u, shape=u.shape[::-1], axis=1 - u.axis)
