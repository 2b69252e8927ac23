"""Tucker: a convolution's update through a small core, as LoCon with ``lora_mid`` stores it (arXiv:2309.14859)."""

from __future__ import annotations

from math import prod
from typing import Self

from loratools.core import generic
from loratools.core.routes import route
from loratools.core.update import Array, Delta, Leaf, Update, kind, shape_of
from loratools.errors import FormatError
from loratools.kinds.dense import Dense
from loratools.kinds.lowrank import LowRank, low_rank
from loratools.linalg import seeds
from loratools.linalg.factored import SVD
from loratools.linalg.namespace import namespace, up, working_dtype


@kind("tucker")
class Tucker(Delta):
    """D[o, i, ...] = scale * sum_mn b[o, m] core[m, n, ...] a[n, i].

    b (out, r1), core (r1, r2, *kernel), a (r2, in).
    """

    core: Leaf | Array
    b: Leaf | Array
    a: Leaf | Array
    scale: float = 1.0

    def __post_init__(self) -> None:
        core, b, a = shape_of(self.core), shape_of(self.b), shape_of(self.a)
        if len(core) < 2 or len(b) != 2 or len(a) != 2 or (b[1], a[0]) != core[:2]:
            raise FormatError(
                "the factors do not fit the core",
                expected="core (r1, r2, ...), b (out, r1), a (r2, in)",
                got=f"core {core}, b {b}, a {a}",
            )

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the base parameter: (out, in, *kernel)."""
        return shape_of(self.b)[0], shape_of(self.a)[1], *shape_of(self.core)[2:]

    def factored(self) -> LowRank:
        """Return the exact pair of rank r1: the core is contracted into a; O(r1 r2 in k)."""
        dtype = working_dtype(self.core, self.b, self.a)
        core, b, a = up(self.core, dtype), up(self.b, dtype), up(self.a, dtype)
        xp = namespace(core)
        r1, r2 = core.shape[:2]
        kernel = prod(core.shape[2:])
        folded = xp.permute_dims(core.reshape(r1, r2, kernel), (0, 2, 1)) @ a  # (r1, kernel, in)
        return LowRank(b, xp.permute_dims(folded, (0, 2, 1)).reshape(r1, -1), self.scale, self.shape)

    def dense(self) -> Array:
        """Return D in ``shape``; O(m n r1)."""
        return self.factored().dense()

    def matmul(self, x: Array) -> Array:
        """Return D x through the pair of rank r1."""
        return self.factored().matmul(x)

    def rmatmul(self, y: Array) -> Array:
        """Return D^T y through the pair of rank r1."""
        return self.factored().rmatmul(y)

    @classmethod
    def example(cls, seed: int) -> Self:
        """A 5 x 4 convolution with a 3 x 3 kernel and a core of 3 x 2, scaled by 2."""
        core = seeds.uniform(seeds.key_of(seed, "tucker.core"), 6, 9).reshape(3, 2, 3, 3) - 0.5
        b = seeds.uniform(seeds.key_of(seed, "tucker.b"), 5, 3) - 0.5
        return cls(core, b, seeds.uniform(seeds.key_of(seed, "tucker.a"), 2, 4) - 0.5, 2.0)


@low_rank.register(Tucker)
def _(u: Tucker) -> LowRank | None:
    return u.factored()


@generic.svd.register(Tucker)
def _(u: Tucker, k: int, *, seed: int = 0) -> SVD:
    return generic.svd(u.factored(), k, seed=seed)


@generic.svdvals.register(Tucker)
def _(u: Tucker) -> Array:
    return generic.svdvals(u.factored())


@generic.inner.register(Tucker)
def _(u: Tucker, v: Delta) -> float:
    return generic.inner(u.factored(), v)


@route(Tucker, LowRank, cost=2.0)
def _contracted(u: Tucker) -> Update:
    return u.factored()


@route(Tucker, Dense, cost=10.0)
def _form(u: Tucker) -> Update:
    return Dense(u.dense())
