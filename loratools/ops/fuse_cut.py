"""From a fused update to what a file can hold: truncated factors, or the whole, and what that cost."""

from __future__ import annotations

from dataclasses import dataclass, replace

from loratools.core import generic
from loratools.core.adapter import Adapter
from loratools.core.update import Array, Delta, namespace
from loratools.errors import UsageError
from loratools.fusion.combine import Zero, dtype_of
from loratools.fusion.tiles import Tiled
from loratools.kinds.dense import Dense
from loratools.kinds.lowrank import LowRank, low_rank, stored_as
from loratools.kinds.sparse import Sparse
from loratools.linalg import seeds
from loratools.linalg.factored import SVD, frobenius
from loratools.linalg.namespace import down, up
from loratools.linalg.rsvd import Matrix, Operator, rsvd
from loratools.ops.squeeze import squeeze

KEPT_BYTES = 64 << 20
"""A tiled update of this size is formed once and kept while it is decomposed; a larger one anew in every pass."""

POWER = 2  # power iterations: within 0.3 % of the optimum (linalg.rsvd); every one is a pass over the tiles


@dataclass(frozen=True)
class Aim:
    """What a fused module is to become: of a ``rank`` (a number or ``full``), or with a share of its ``energy``."""

    rank: int | str | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.energy is not None:
            raise UsageError(
                "rank and energy are two targets", expected="one of them", got=f"{self.rank}, {self.energy}"
            )
        wrong = isinstance(self.rank, int) and self.rank < 1
        if wrong or (isinstance(self.rank, str) and self.rank != "full"):
            raise UsageError("no such rank", expected="a positive integer, or full", got=self.rank)
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError("energy is a share", expected="0 < energy <= 1", got=self.energy)

    @property
    def words(self) -> str:
        """The aim as a user would ask for it."""
        return f" --rank {self.rank}" if self.rank else f" --energy {self.energy:g}" if self.energy else ""

    @property
    def exact_rank(self) -> int | None:
        """The rank, where a number was given."""
        return self.rank if isinstance(self.rank, int) else None


@dataclass(frozen=True)
class Cut:
    """The update as stored, the squared error of the cut, the squared norm of what was cut, and how it was done."""

    update: Delta
    lost: float
    whole: float
    cut: bool


def cut(u: Delta, aim: Aim, *, default: int, dtype: str, seed: int) -> Cut:
    """Return the update at the aim: factors through :func:`squeeze`, what has none by a randomized SVD of its tiles.

    Without an aim factors and sparse entries stay as they are, and any other update is cut to the rank ``default``.
    """
    if len(u.shape) == 1:
        return Cut(Dense(down(u.dense(), dtype)), 0.0, 0.0, False)
    low = low_rank(u)
    if isinstance(u, Sparse) and aim.exact_rank is None and aim.energy is None:
        return Cut(replace(u, values=stored_as(u.values, dtype)), 0.0, 0.0, False)
    if low is None:
        return _cut_tiles(u, aim, default, dtype, seed)
    if ((aim.rank is None or aim.rank == "full") and aim.energy is None) or isinstance(u, Zero):
        stored = LowRank(stored_as(low.b, dtype), stored_as(low.a, dtype), low.scale, low.shape)
        return Cut(folded(stored, dtype), 0.0, 0.0, False)
    done = squeeze(Adapter({"it": low}), rank=aim.exact_rank, energy=aim.energy, dtype=dtype)
    assert done.report is not None
    whole = frobenius(low.b, low.a, scale=low.scale) ** 2
    update = done["it"]
    assert isinstance(update, LowRank)
    error = float(done.report.modules[0]["relative_error"])
    return Cut(update, error**2 * whole, whole, True)


def folded(u: LowRank, dtype: str) -> LowRank:
    """Return the same update at scale 1 (b takes the scale), in the storage dtype."""
    if u.scale == 1:
        return u
    return LowRank(down(u.scale * up(u.b), dtype), u.a, 1.0, u.shape)


def _cut_tiles(u: Delta, aim: Aim, default: int, dtype: str, seed: int) -> Cut:
    if aim.rank == "full":
        return Cut(Dense(_formed(u, dtype).reshape(u.shape)), 0.0, 0.0, False)
    op, whole = _operator(u)
    most = min(u.matrix_shape)
    k = min(aim.exact_rank or default, most)
    found = _decomposed(op, k, seed)
    while aim.energy is not None and _energy(found.s) < aim.energy * whole and k < most:
        k = min(2 * k, most)
        found = _decomposed(op, k, seed)
    if aim.energy is not None:
        k = _count(found.s, aim.energy * whole)
    root = namespace(found.s).sqrt(found.s[:k])
    update = LowRank(down(found.u[:, :k] * root, dtype), down(found.vh[:k, :] * root[:, None], dtype), 1.0, u.shape)
    return Cut(update, max(whole - _energy(found.s[:k]), 0.0), whole, True)


def _decomposed(op: Operator, k: int, seed: int) -> SVD:
    return rsvd(op, k, power=POWER, key=seeds.key_of(seed, "fuse"))


def _energy(s: Array) -> float:
    return float(namespace(s).sum(up(s, "float64") ** 2))


def _count(s: Array, energy: float) -> int:
    """Return how many values it takes to reach the energy, at least one and at most all."""
    xp = namespace(s)
    held = xp.cumulative_sum(up(s, "float64") ** 2)
    return min(1 + int(xp.sum(held < energy)), int(s.shape[0]))


def _operator(u: Delta) -> tuple[Operator, float]:
    """Return the update as an operator, formed once where it is small, and its squared norm."""
    if isinstance(u, Tiled):
        m, n = u.matrix_shape
        if m * n * 4 > KEPT_BYTES:
            return generic.Operator(u), sum(_square(tile) for _, tile in u.tiles())
    x = _formed(u, dtype_of([u]))
    return Matrix(x), _square(x)


def _formed(u: Delta, dtype: str) -> Array:
    """Return the matrix view in a storage dtype; a tiled update is rounded tile by tile."""
    if isinstance(u, Tiled):
        tiles = [down(tile, dtype) for _, tile in u.tiles()]
        return namespace(*tiles).concat(tiles, axis=0)
    return down(u.matrix(), dtype)


def _square(x: Array) -> float:
    """Return the squared Frobenius norm: rows in the precision of x, their sum in fp64."""
    xp = namespace(x)
    return float(xp.sum(up(xp.linalg.vecdot(x, x), "float64")))
