"""The work of a fusion: module after module, in parallel, one module per thread in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loratools.core.pool import parallel_map
from loratools.core.update import Array, Delta, Update, nbytes, tensors
from loratools.errors import LoratoolsError, MismatchError
from loratools.fusion.base import Method
from loratools.fusion.combine import Zero, like_of
from loratools.io.base import Base
from loratools.io.spool import Spool
from loratools.io.stats import Collected
from loratools.kinds.dora import DoraDelta
from loratools.kinds.lowrank import LowRank, low_rank, low_ranks, with_low_ranks
from loratools.kinds.stack import Stack
from loratools.linalg.namespace import dtype_name, is_float
from loratools.ops.fuse_cut import Aim, Cut, cut
from loratools.ops.fuse_inputs import Row, true_updates
from loratools.ops.fuse_tally import Figures, measured, measured_sum, summed
from loratools.ops.fuse_words import Module

Statistics = Sequence[tuple[Collected, Mapping[str, str]]]
"""Per adapter: what its modules saw, and parameter -> module."""


@dataclass(frozen=True)
class How:
    """The method with its settings, the weights, and what its results become."""

    method: Method
    settings: Mapping[str, Any]
    weights: tuple[float, ...]
    aim: Aim
    dtype: str | None
    seed: int

    @property
    def words(self) -> str:
        """The method as a user would ask for it."""
        said = "".join(f" {name}={value}" for name, value in self.settings.items() if value is not None)
        return f"{self.method.name}{said}{self.aim.words}"

    def run(self, deltas: Sequence[Delta], statistics: Sequence[Array] | None) -> Delta:
        """Fuse the updates of one matrix."""
        handed = {"seed": self.seed, "statistics": statistics}
        more = {name: handed[name] for name in self.method.handed_over}
        return self.method.run(deltas, self.weights, **self.settings, **more)

    def rehearse(self) -> None:
        """Fuse 5 x 7 examples, so that settings and weights that contradict each other are refused before any work."""
        self.method.check_count(len(self.weights))
        examples = [LowRank.example(i) for i in range(len(self.weights))]
        self.run(examples, [u.dense()[0, :] ** 2 + 1.0 for u in examples])


@dataclass(frozen=True)
class Work:
    """Fuses module after module; ``in_base`` are the modules' names in the base."""

    how: How
    base: Base | None
    in_base: Mapping[str, str]
    statistics: Statistics | None
    spool: Spool

    def done(self, rows: Mapping[str, Row]) -> dict[str, Module]:
        """Return every fused module with its figures."""
        weights = [sum(nbytes(u) for u in row if u is not None) for row in rows.values()]
        found = parallel_map(lambda item: self._one(*item), list(rows.items()), weights=weights)
        return dict(zip(rows, found, strict=True))

    def _one(self, name: str, row: Row) -> Module:
        """Fuse one parameter: one matrix, or every expert of a stack."""
        try:
            deltas = true_updates(name, row, self.base, self.in_base)
            statistics = None if self.statistics is None else [_inputs(*one, name) for one in self.statistics]
            dtype = self.how.dtype or _widest(row)
            if any(isinstance(d, Stack) for d in deltas):
                return self._stack(deltas, dtype, statistics)
            update, figures, full = self._matrix(deltas, dtype, statistics)
            return Module(self._kept(update), row, figures, full)
        except LoratoolsError as error:
            raise error.at(parameter=name) from error

    def _stack(self, deltas: Sequence[Delta | None], dtype: str, statistics: Sequence[Array] | None) -> Module:
        stack = next(d for d in deltas if isinstance(d, Stack))
        experts = [None if d is None else low_ranks(d) for d in deltas]
        if any(d is not None and (e is None or len(e) != stack.shape[0]) for d, e in zip(deltas, experts, strict=True)):
            raise MismatchError("a stack of experts meets an update that is none", expected=stack.shape)
        found = [
            self._matrix([None if e is None else e[i] for e in experts], dtype, statistics)
            for i in range(stack.shape[0])
        ]
        update = with_low_ranks(stack, [low for u, *_ in found if (low := low_rank(u)) is not None])
        figures = summed([figures for _, figures, _ in found])
        return Module(self._kept(update), tuple(deltas), figures, any(full for *_, full in found))

    def _matrix(
        self, deltas: Sequence[Delta | None], dtype: str, statistics: Sequence[Array] | None
    ) -> tuple[Delta, Figures, bool]:
        """Return the fused update as stored, its figures, and whether a result without factors was cut."""
        present = [_loaded(d) for d in deltas if d is not None]
        zero = Zero(present[0].shape, like_of(present))
        ready = iter(present)
        inputs = [zero if d is None else next(ready) for d in deltas]
        fused = self.how.run(inputs, statistics)
        ranks = sum(_rank(d) for d in deltas if d is not None)
        done = cut(fused, self.how.aim, default=ranks, dtype=dtype, seed=self.how.seed)
        figures = self._figures(inputs, done)
        return done.update, figures, done.cut and low_rank(fused) is None

    def _figures(self, inputs: Sequence[Delta], done: Cut) -> Figures:
        loaded = [_loaded(d) for d in inputs]
        pairs = [d for d in loaded if isinstance(d, LowRank)]
        if self.how.method.name == "linear" and not done.cut and all(self.how.weights) and len(pairs) == len(inputs):
            return measured_sum(pairs, self.how.weights)
        return measured(loaded, _loaded(done.update), done.lost, done.whole)

    def _kept(self, update: Update) -> Update:
        """Return the update with its tensors in the spool."""
        return replace(update, **{name: self.spool.keep(t) for name, t in tensors(update)})  # type: ignore[type-var]


def _inputs(stats: Collected, at: Mapping[str, str], name: str) -> Array:
    inputs = stats[at[name]].inputs
    assert inputs is not None  # checked before any work
    return inputs.read()


def _loaded(d: Delta) -> Delta:
    """Return the update with factors in memory, in the dtype to compute in, where it has factors."""
    low = low_rank(d)
    return d if low is None else LowRank(*low.factors(), low.scale, low.shape)


def _rank(d: Delta) -> int:
    """Return the rank of an update's factors, or of the direction inside a DoRA's; without factors any rank."""
    low = low_rank(d.direction if isinstance(d, DoraDelta) else d)
    return min(d.matrix_shape) if low is None else low.rank


def _widest(row: Row) -> str:
    """Return the dtype to store the result in: the inputs' own where they agree, fp32 where 16-bit dtypes mix."""
    found = {dtype_name(t) for u in row if u is not None for _, t in tensors(u) if is_float(dtype_name(t))}
    for dtype in ("float64", "float32"):
        if dtype in found:
            return dtype
    return found.pop() if len(found) == 1 and found <= {"float16", "bfloat16"} else "float32"
