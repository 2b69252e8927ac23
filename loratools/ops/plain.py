"""Updates without factors made low-rank before they are cut: exactly where their rank is bounded, else in part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from loratools.core.adapter import Adapter
from loratools.core.generic import BLOCK, Operator
from loratools.core.update import Array, Delta, Update
from loratools.errors import NeedsBaseError, NumericsError
from loratools.files import BaseLike, open_base
from loratools.kinds.dense import Dense
from loratools.kinds.dora import Dora
from loratools.kinds.lowrank import LowRank, low_rank, low_ranks
from loratools.kinds.rebased import Rebased
from loratools.kinds.replace import Replace
from loratools.kinds.replace_rows import ReplaceRows
from loratools.linalg.dense import thin_svd
from loratools.linalg.namespace import all_finite, namespace, up
from loratools.linalg.rsvd import rsvd
from loratools.linalg.seeds import key_of
from loratools.ops.base_names import base_names
from loratools.ops.fold import square

POWER = 4  # power iterations: within 0.1% of the optimum on slowly decaying spectra
CARRIED = (Dense, Dora, Replace, ReplaceRows, Rebased)


class Original(NamedTuple):
    """An update that became factors: itself, its rank bound, |D|_F^2 and |D - factors|_F^2."""

    update: Update
    rank: int
    total: float
    lost: float


class Plain(NamedTuple):
    """The adapter in factors, and what became some by more than restating."""

    adapter: Adapter
    originals: Mapping[str, Original]


def plain(adapter: Adapter, base: BaseLike | None, *, rank: int | None = None) -> Plain:
    """Return the adapter with every operator and every coat as factors; vectors that depend on the base as differences.

    Exact where the rank is bounded (HRA, DEFT, ...). Else the ``rank`` leading singular triplets by randomised SVD of
    the operator, of which nothing is formed; without a rank all of them, by a dense SVD in fp32. What is stored whole,
    full differences and DoRA stay as they are. Raises :class:`NeedsBaseError` naming the first coat without its base.
    """
    wanted = {name: u for name, u in adapter.items() if needs_factors(u)}
    if not wanted:
        return Plain(adapter, {})
    opened = open_base(base)
    coats = {name: u for name, u in wanted.items() if not isinstance(u, Delta)}
    if coats and opened is None:
        name, first = next(iter(coats.items()))
        raise NeedsBaseError(
            f"{len(coats)} updates of kind {first.kind} are only defined together with their base",
            file=adapter.meta.path, parameter=name, hint="--base BASE, the model of training",
        )  # fmt: skip
    names = base_names(replace(adapter, updates=coats), opened)[0] if coats and opened is not None else {}
    found: dict[str, Original] = {}

    def one(name: str, u: Update) -> Update:
        if name not in wanted:
            return u
        d = u if isinstance(u, Delta) else u.delta(opened[names[name]])  # type: ignore[index]
        if len(d.shape) == 1:
            return Dense(d.dense())
        new, bound, exact = _factors(name, d, rank)
        total, lost = _squares(u, d, new, exact=exact)
        found[name] = Original(u, bound, total, lost)
        return new

    done = adapter.map(one)
    return Plain(done, found)


def needs_factors(u: Update) -> bool:
    """True for what squeezing can only act on as factors, and is none: operators of full rank, coats over the base."""
    if isinstance(u, CARRIED) or (isinstance(u, Delta) and len(u.shape) == 1):
        return False
    return low_ranks(u) is None


def _factors(name: str, d: Delta, rank: int | None) -> tuple[LowRank, int, bool]:
    """Return factors, the bound of the update's rank, and whether they are exact."""
    flat = low_rank(d)
    if flat is not None:
        return flat, min(flat.rank, *d.matrix_shape), True
    full = min(d.matrix_shape)
    if rank is None or rank >= full:
        u, s, vh = thin_svd(_finite(d.matrix()))
        k = full
    else:
        u, s, vh = rsvd(Operator(d), rank, power=POWER, key=key_of(0, name))
        k = rank
    root = up(s[:k]) ** 0.5
    new = LowRank(u[:, :k] * up(root, "float32"), up(root, "float32")[:, None] * vh[:k, :], 1.0, d.shape)
    return new, full, k == full


def _finite(x: Array) -> Array:
    if not all_finite(x):
        raise NumericsError("the update is not finite on this base")
    return x


def _squares(u: Update, d: Delta, new: LowRank, *, exact: bool) -> tuple[float, float]:
    """Return |D|_F^2 and |D - new|_F^2, the second 0 where it is rounding alone.

    What a coat makes of its base is formed, as large as the base that is there; operators some columns at a time.
    """
    if not isinstance(u, Delta):
        formed = d.matrix()
        return square(formed), 0.0 if exact else square(formed - new.matrix())
    b, _ = new.factors()
    xp, n, total, lost = namespace(b), d.matrix_shape[1], 0.0, 0.0
    for start in range(0, n, BLOCK):
        eye = xp.eye(n, min(BLOCK, n - start), k=-start, dtype=b.dtype, device=b.device)
        part = d.matmul(eye)
        total += square(part)
        lost += 0.0 if exact else square(part - new.matmul(eye))
    return total, lost
