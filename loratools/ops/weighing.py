"""Which entries of an update matter: weights of the norm, from statistics of the modules or from the base's norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from loratools.core.adapter import Adapter
from loratools.core.update import Array, Leaf, namespace
from loratools.errors import FormatError, MismatchError, NeedsBaseError, NumericsError, UsageError
from loratools.io.base import Base
from loratools.io.stats import Stats, StatsLike, load_stats
from loratools.kinds.lowrank import LowRank, low_ranks
from loratools.linalg import factored, weighted
from loratools.linalg.factored import Choose, frobenius
from loratools.linalg.namespace import to_numpy, up, working_dtype
from loratools.linalg.weighted import Weights
from loratools.ops.norm_gains import norm_gains
from loratools.ops.ranks import Target

NORM = "norm"


class Squares(NamedTuple):
    """|D|^2 and |D_written - D|^2, Frobenius, and both in the weighted norm."""

    whole: float
    wrong: float
    weighted_whole: float
    weighted_wrong: float


@dataclass(frozen=True)
class Weighing:
    """Statistics matched to the updates of an adapter; ``turned`` are the parameters stored (in, out).

    ``said`` is what the user should know: modules without statistics, statistics without a module.
    """

    stats: Mapping[str, Stats]
    turned: frozenset[str] = frozenset()
    said: tuple[str, ...] = ()
    words: str = ""

    def __contains__(self, name: str) -> bool:
        return name in self.stats

    def weights(self, name: str, like: LowRank) -> Weights:
        """Read the weights of one update: left for the rows of the stored parameter, right for its columns."""
        stats = self.stats[name]
        outputs, inputs = (_placed(leaf, like) for leaf in (stats.out_diag, stats.inputs))
        weights = Weights(inputs, outputs) if name in self.turned else Weights(outputs, inputs)
        try:
            return weights.checked(*like.matrix_shape)
        except NumericsError as error:  # of the statistics, not of the update
            raise FormatError(error.what, parameter=name, expected=error.expected, hint=error.hint) from error

    def truncate(self, name: str, u: LowRank, choose: Choose) -> factored.Truncation:
        """Cut one product in its weighted norm; in the plain one where it has no statistics."""
        if name not in self:
            return factored.truncate(u.b, u.a, choose, scale=u.scale)
        return weighted.truncate(u.b, u.a, choose, weights=self.weights(name, u), scale=u.scale)

    def svdvals(self, name: str, u: LowRank) -> Array:
        """Return the singular values of the weighted product, all min(R, m, n) of them."""
        return weighted.singular_values(*u.factors(), self.weights(name, u), scale=u.scale)

    def squares(self, name: str, before: Sequence[LowRank], after: Sequence[LowRank]) -> Squares:
        """Measure what was written, rounding included; summed over experts."""
        found = [self._squares(name, u, v) for u, v in zip(before, after, strict=True)]
        return Squares(*(sum(column) for column in zip(*found, strict=True)))

    def _squares(self, name: str, u: LowRank, v: LowRank) -> Squares:
        weights, whole, wrong = self.weights(name, u), (*u.factors("float64"),), difference(u, v)
        return Squares(
            frobenius(*whole, scale=u.scale) ** 2,
            frobenius(*wrong) ** 2,
            weighted.norm(*whole, weights, scale=u.scale) ** 2,
            weighted.norm(*wrong, weights) ** 2,
        )


def weighing(stats: StatsLike, adapter: Adapter, base: Base | None, target: Target | None = None) -> Weighing:
    """Return the weighing that ``stats`` asks for: a file or mapping, or ``"norm"`` for the gains of the base's norms.

    Everything is matched and its shapes are checked, before any work. Raises MismatchError where statistics fit no
    module or have another shape (first three and the count), NeedsBaseError for ``"norm"`` without a base, UsageError
    for targets that statistics contradict.
    """
    if target is not None and target.noise:
        raise UsageError("rank=noise looks at the plain spectrum", hint="leave out the statistics, or give a number")
    sizes = {name: us[0].matrix_shape for name, u in adapter.items() if (us := low_ranks(u)) is not None}
    turned = frozenset(n for n in sizes if adapter.meta.layout.get(n, {}).get("stored") == "in_out")
    if stats == NORM:
        if base is None:
            raise NeedsBaseError("the gains of the norms are in the base", hint="pass --base BASE")
        found = norm_gains(sizes, base)
        rest = _listed([n for n in sizes if n not in found])
        said = (f"{len(sizes) - len(found)} of {len(sizes)} modules read no norm's output and stay unweighted{rest}",)
        return Weighing(found, turned, said if len(found) < len(sizes) else (), "stats=norm")
    opened = load_stats(stats)
    names = opened.resolve(sizes)
    matched = {name: opened[module] for name, module in names.items()}
    _check_shapes(matched, sizes, turned, opened.path)
    if target is not None and target.size is not None and len(matched) < len(sizes):
        raise UsageError(
            "a budget shared out by weighted errors needs statistics of every module", file=opened.path,
            got=f"none for {len(sizes) - len(matched)}{_listed([n for n in sizes if n not in matched])}",
        )  # fmt: skip
    return Weighing(matched, turned, _remarks(sizes, names, opened), "weighted by statistics")


def difference(u: LowRank, v: LowRank) -> tuple[Array, Array]:
    """Return factors of D_v - D_u in fp64 in which nothing cancels where v only restates u."""
    b, a = u.factors("float64")
    bw, aw = v.factors("float64")
    b, bw = b * u.scale, bw * v.scale
    xp = namespace(b)
    if u.rank == v.rank:
        return xp.concat([bw - b, bw], axis=1), xp.concat([a, aw - a], axis=0)
    return xp.concat([b, bw], axis=1), xp.concat([-a, aw], axis=0)


def _placed(leaf: Leaf | None, like: LowRank) -> Array | None:
    """Read a statistic into the library and onto the device of the factors."""
    if leaf is None:
        return None
    value = to_numpy(leaf)
    if isinstance(like.b, Leaf):
        return value
    return namespace(like.b).asarray(up(value, working_dtype(value)), device=like.b.device)


def _check_shapes(
    matched: Mapping[str, Stats], sizes: Mapping[str, tuple[int, int]], turned: frozenset[str], path: object
) -> None:
    wrong = []
    for name, stats in matched.items():
        out, width = sizes[name][::-1] if name in turned else sizes[name]
        for what, leaf, size in (("inputs", stats.inputs, width), ("outputs", stats.out_diag, out)):
            if leaf is not None and leaf.shape[0] != size:
                wrong.append(f"{name}: {leaf.shape[0]} {what}, not {size}")
    if wrong:
        raise MismatchError(
            f"{len(wrong)} statistics do not fit their modules", file=path, got="; ".join(wrong[:3]),
            hint="collect them on the model that the adapter was trained on",
        )  # fmt: skip


def _remarks(sizes: Mapping[str, object], names: Mapping[str, str], opened: Mapping[str, Stats]) -> tuple[str, ...]:
    missing = [name for name in sizes if name not in names]
    extra = [module for module in opened if module not in names.values()]
    return (
        *([f"no statistics for {len(missing)} of {len(sizes)} modules, which stay unweighted{_listed(missing)}"]
          if missing else []),
        *([f"statistics of {len(extra)} modules that the adapter does not change{_listed(extra)}"] if extra else []),
    )  # fmt: skip


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f" ({', '.join(names[:3])}{more})"
