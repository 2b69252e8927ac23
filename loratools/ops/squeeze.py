"""squeeze: the best smaller adapter, exactly, without ever forming an update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice, pairwise
from typing import TYPE_CHECKING, NamedTuple

from loratools.core.adapter import Adapter
from loratools.core.update import Leaf, Update, tensors
from loratools.errors import LoratoolsError, NumericsError, UsageError
from loratools.files import BaseLike, open_base
from loratools.io.base import Base
from loratools.kinds.dora import Dora, refitted
from loratools.kinds.lowrank import LowRank, canonical, low_ranks, padded, restated, restates_exactly, with_low_ranks
from loratools.linalg import factored
from loratools.linalg.namespace import all_finite, device_of, down_together, dtype_name, is_float, namespace, to_numpy
from loratools.ops.ranks import Choose, Edge, Target, no_edge
from loratools.ops.tally import Tally, squeeze_report
from loratools.report import Report

if TYPE_CHECKING:
    from loratools.io.stats import StatsLike
    from loratools.ops.plain import Original
    from loratools.ops.weighing import Weighing

FACTORED = ("lowrank", "stack", "dora", "dense", "replace", "replace_rows", "rebased")
"""Kinds that are factors already, or are carried."""

METHODS = ("exact", "rsvd")


def squeeze(
    adapter: Adapter,
    *,
    rank: int | str | None = None,
    energy: float | None = None,
    error: float | None = None,
    size: int | str | None = None,
    max_rank: int | None = None,
    rank_multiple: int = 1,
    uniform: bool = False,
    consumer: str | None = None,
    dtype: str | None = None,
    base: BaseLike | None = None,
    keep_alpha: bool = False,
    allow_nonfinite: bool = False,
    format: str | None = None,
    stats: StatsLike | None = None,
    nested: bool = False,
    method: str | None = None,
    seed: int = 0,
) -> Adapter:
    """Return the adapter whose every update is the nearest one of lower rank (Frobenius; Eckart-Young).

    Exactly one target: ``rank`` per module (capped by the module's own rank), or ``"noise"``: what stands above the
    edge of the rounding noise of ``base``, which must be of half precision; ``energy``, the smallest rank that keeps
    this share of the squared Frobenius norm; ``error``, the smallest rank with at most this relative Frobenius error;
    ``size``, the most accurate adapter whose file, written as ``format`` (default: the source's own), has at most this
    many bytes. ``max_rank`` caps any of them; ``rank_multiple`` rounds up; ``uniform`` gives all modules the largest
    rank chosen; ``consumer`` rounds that up to a rank its program accepts. Ranks beyond a module's own are padded with
    zeros (function unchanged). The scale is folded into balanced factors (scale 1) unless ``keep_alpha``.

    ``stats`` weighs the norm: statistics of the modules (a file, or a mapping of its keys; :mod:`loratools.io.stats`),
    or ``"norm"``, the gains of the norms of ``base``. Energies, errors that are asked for, and a budget's are weighted
    then; the report has both errors, and says which modules have no statistics. ``nested`` orders the channels of every
    module so that each leading part is the optimum of its rank at an unchanged scale, also where nothing is cut; no
    target means all ranks.

    ``method``: ``exact`` or ``rsvd`` for every module; by default factors exactly and operators of full rank by a
    randomised SVD. ``rsvd`` (oversampling 10, two power iterations, keyed by ``seed``) serves a ``rank`` alone; its
    error is measured afterwards.

    DoRA: the direction is squeezed and the magnitude kept; with ``base`` the magnitude is refitted by least squares.
    Updates without factors become some first (:mod:`loratools.ops.plain`): exactly where their rank is bounded, else
    the leading part; those that depend on the base need ``base``. What is stored whole is carried as it is.
    ``report`` of the result holds ranks, energies, errors and bytes.

    Cost O((m + n) R^2 + R^3) per module, the spectra twice for targets that compare modules. Guarantee: error within
    1e-6 |D| of the optimum before rounding to ``dtype``. Raises :class:`UsageError` on contradicting targets or an
    impossible size, :class:`NumericsError` on non-finite input unless ``allow_nonfinite`` carries such modules through.
    """
    target = Target.of(
        rank=rank,
        energy=energy,
        error=error,
        size=size,
        max_rank=max_rank,
        rank_multiple=rank_multiple,
        uniform=uniform,
        consumer=consumer,
        nested=nested,
    )
    check_method(method, target, weighted=stats is not None)
    opened = open_base(base)
    enough = None if stats is not None or method == "exact" else target.enough
    adapter, originals = in_factors(adapter, opened, enough)
    edge: Edge = no_edge
    ranks: dict[str, int] = {}
    weigh = None
    if stats is not None:
        from loratools.ops.weighing import weighing  # here and below: most runs do not need them

        weigh = weighing(stats, adapter, opened, target)
    if target.noise:
        from loratools.ops.edges import noise_edges

        edge = noise_edges(adapter, opened)
    if target.is_global:
        from loratools.ops.plan import Storage, planned

        ranks = planned(adapter, target, edge, Storage(dtype, format, allow_nonfinite), weigh)
    how = How(target, ranks, dtype, keep_alpha, allow_nonfinite, edge, weigh, seed if method == "rsvd" else None)
    done, report = squeezed(adapter, how, opened, originals)
    return replace(done.with_history(f"squeeze {how.words}"), report=report)


def check_method(method: str | None, target: Target, *, weighted: bool) -> None:
    """Raise UsageError for an unknown method, and for what a randomised SVD cannot serve: it knows no spectrum."""
    if method not in (None, *METHODS):
        raise UsageError("no such method", expected=" or ".join(METHODS), got=method)
    if method == "rsvd" and (target.rank is None or target.is_global or target.nested or weighted):
        raise UsageError(
            "--method rsvd serves --rank N alone", hint="the exact method is faster for factors, and serves all"
        )


def in_factors(adapter: Adapter, base: Base | None, rank: int | None) -> tuple[Adapter, Mapping[str, Original]]:
    """Return the adapter with factors where it had none, at least ``rank`` leading ones, and what it had there."""
    if all(u.kind in FACTORED for u in adapter.values()):
        return adapter, {}
    from loratools.ops.plain import plain

    return plain(adapter, base, rank=rank)


@dataclass(frozen=True)
class How:
    """What every module goes through: the target, ranks planned beforehand (by name), storage, scale, tolerance."""

    target: Target
    ranks: Mapping[str, int]
    dtype: str | None = None
    keep_alpha: bool = False
    allow_nonfinite: bool = False
    edge: Edge = no_edge
    weighing: Weighing | None = None
    sketch_seed: int | None = None  # of the randomised SVD, where it is asked for

    def __post_init__(self) -> None:
        if self.dtype is not None and not is_float(self.dtype):
            raise UsageError("no floating dtype to store factors in", expected="float16, bfloat16, ...", got=self.dtype)

    @property
    def words(self) -> str:
        """What was asked for, in words, for reports and histories."""
        more = ["" if self.weighing is None else self.weighing.words, "" if self.sketch_seed is None else "method=rsvd"]
        return " ".join(filter(None, (self.target.words, *more)))

    def rule(self, name: str) -> Choose:
        """Return the rank rule of one module: the rank planned for it, or what the target says of its spectrum."""
        rank = self.ranks.get(name)
        if rank is not None:
            return lambda s: rank
        edge = self.edge(name)
        return lambda s: self.target.rank_for(s, edge)

    def stored(self, name: str, direction: LowRank, result: factored.Truncation) -> LowRank:
        """Return the truncation as it is written: scale, dtype, padding.

        Where nothing is cut the factors stay, if the scale can be folded into them without rounding.
        """
        scale = direction.scale if self.keep_alpha and direction.scale != 0 else 1.0
        whole = result.rank == direction.rank and not self.target.nested
        if whole and restates_exactly(direction, scale, self.dtype):
            new = restated(direction, scale=scale, dtype=self.dtype)
        else:
            new = canonical(direction, result, scale=scale, dtype=self.dtype)
        wanted = self.ranks.get(name) or (self.target.rounded(new.rank) if self.target.pads else new.rank)
        return padded(new, wanted, name=name)


def squeezed(
    adapter: Adapter, how: How, base: BaseLike | None = None, originals: Mapping[str, Original] | None = None
) -> tuple[Adapter, Report]:
    """Truncate every update that has a low-rank direction; return the adapter and the figures."""
    magnitudes = Magnitudes.of(adapter, base)
    tally = Tally(originals or {})

    def batch(names: Sequence[str], updates: Sequence[Update]) -> Sequence[Update]:
        out = list(updates)
        found = [(i, ds) for i, ds in enumerate(map(low_ranks, updates)) if ds is not None]
        rules = [how.rule(names[i]) for i, ds in found for _ in ds]
        owners = [names[i] for i, ds in found for _ in ds]
        directions = [d for _, ds in found for d in ds]
        cuts, storable = from_device(_truncate(owners, directions, rules, how), directions, how)
        results, ready = iter(cuts), iter(storable)
        for name, update in zip(names, updates, strict=True):
            if not rest_is_finite(update):
                if not how.allow_nonfinite:
                    raise NumericsError(
                        "a stored tensor is not finite", parameter=name, hint="--allow-nonfinite carries it"
                    )
                tally.nonfinite.append(name)
        for i, ds in found:
            cut, made = ([x for x in islice(xs, len(ds)) if x is not None] for xs in (results, ready))
            try:
                if len(cut) == len(ds):
                    parts = [how.stored(names[i], d, result) for d, result in zip(ds, made, strict=True)]
                    out[i] = magnitudes.refitted(names[i], updates[i], with_low_ranks(updates[i], parts))
                tally.squeezed(names[i], updates[i], ds, cut, out[i], how.weighing)
            except LoratoolsError as error:
                raise error.at(parameter=names[i]) from error
        for i in set(range(len(out))) - {i for i, _ in found}:
            tally.carried(names[i], updates[i])
        return out

    done = adapter.map_groups(batch)
    return done, squeeze_report(tally, adapter, how.words, () if how.weighing is None else how.weighing.said)


Cuts = Sequence[factored.Truncation | None]


def from_device(cuts: Cuts, directions: Sequence[LowRank], how: How) -> tuple[Cuts, Cuts]:
    """Return truncations with their spectra in ordinary memory, and the same with factors in their storage dtypes.

    A GPU answers for all modules at once; asked module by module, it would take longer to answer than to compute.
    Truncations on the CPU come back as they are, and so do factors that have to be scaled first or do not fit.
    """
    found = [r for r in cuts if r is not None]
    if len(found) < len(cuts) or not found or device_of(found[0].b) == "cpu":
        return cuts, cuts
    ends = list(accumulate(r.singular_values.shape[0] for r in found))
    spectra = to_numpy(namespace(found[0].b).concat([r.singular_values for r in found]))
    pieces = (spectra[i:j] for i, j in pairwise([0, *ends]))
    found = [r._replace(singular_values=s) for r, s in zip(found, pieces, strict=True)]
    if how.keep_alpha:
        return found, found
    dtypes = [how.dtype or dtype_name(x) for d in directions for x in (d.b, d.a)]
    stored = down_together([x for r in found for x in (r.b, r.a)], dtypes)
    if stored is None:
        return found, found
    return found, [r._replace(b=b, a=a) for r, b, a in zip(found, stored[::2], stored[1::2], strict=True)]


def rest_is_finite(update: Update) -> bool:
    """True if every floating tensor beyond the low-rank factors (which truncation checks itself) is finite."""
    factors = {id(t) for d in low_ranks(update) or () for t in (d.b, d.a)}
    rest = [t for _, t in tensors(update) if id(t) not in factors and is_float(dtype_name(t))]
    return all(all_finite(t.read() if isinstance(t, Leaf) else t) for t in rest)


class Magnitudes(NamedTuple):
    """DoRA magnitudes that follow their squeezed directions, where a base is given; names are resolved once."""

    base: Base | None
    names: Mapping[str, str]

    @classmethod
    def of(cls, adapter: Adapter, base: BaseLike | None) -> Magnitudes:
        """Open the base and find in it every parameter that has a magnitude."""
        opened = open_base(base)
        coats = [name for name, u in adapter.items() if isinstance(u, Dora)]
        return cls(opened, {} if opened is None else opened.resolve(coats))

    def refitted(self, name: str, before: Update, after: Update) -> Update:
        """Return ``after``, its magnitude refitted to ``before`` on the base (least squares) where there is one."""
        if self.base is None or not isinstance(before, Dora) or not isinstance(after, Dora):
            return after
        return refitted(before, after, self.base[self.names[name]])


def _truncate(
    names: Sequence[str], directions: Sequence[LowRank], rules: Sequence[Choose], how: How
) -> list[factored.Truncation | None]:
    pairs = [(d.b, d.a) for d in directions]
    scales = [d.scale for d in directions]
    try:
        if how.weighing is not None:
            return [how.weighing.truncate(*one) for one in zip(names, directions, rules, strict=True)]
        if how.sketch_seed is not None:
            return [_sketched(*one, how.sketch_seed) for one in zip(names, directions, rules, strict=True)]
        return list(factored.truncate_many(pairs, scales, rules))
    except LoratoolsError as error:
        if len(pairs) > 1:  # find the one at fault
            each = zip(names, directions, rules, strict=True)
            return [r for name, d, rule in each for r in _truncate([name], [d], [rule], how)]
        if isinstance(error, NumericsError):
            if how.allow_nonfinite:
                return [None]
            error.hint = error.hint or "--allow-nonfinite carries such modules through untouched"
        raise error.at(parameter=names[0]) from error


def _sketched(name: str, u: LowRank, rule: Choose, seed: int) -> factored.Truncation:
    from loratools.linalg import seeds, sketched

    return sketched.truncate(u.b, u.a, rule, key=seeds.key_of(seed, name), scale=u.scale)
