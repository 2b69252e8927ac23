"""Ranks that depend on all modules at once: a byte budget, one rank for all, a rank that a server accepts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from loratools.core import generic
from loratools.core.adapter import Adapter
from loratools.core.update import Array, Leaf, Update
from loratools.errors import NumericsError, UsageError
from loratools.files import written_size
from loratools.formats.base import FORMATS
from loratools.kinds.lowrank import LowRank, low_ranks, with_low_ranks
from loratools.leaf import ITEMSIZE
from loratools.linalg.namespace import dtype_name, namespace
from loratools.ops.allocate import Module, allocate
from loratools.ops.ranks import Edge, Target

if TYPE_CHECKING:
    from loratools.ops.weighing import Weighing


def planned(
    adapter: Adapter, target: Target, edge: Edge, how: Storage, weighing: Weighing | None = None
) -> dict[str, int]:
    """Return the rank of every module that is squeezed, for a target that compares modules. Reads every factor once.

    Raises :class:`UsageError` naming the smallest possible size where a budget is smaller still.
    """
    spectra = _spectra(adapter, how.allow_nonfinite, weighing)
    if target.size is None:
        ranks = {name: target.rank_for(s, edge(name)) for name, s in spectra.items()}
        return dict.fromkeys(spectra, target.one_for_all(ranks))
    budget = _Budget(
        adapter, target, how.dtype, how.format, {n: d for n in spectra if (d := low_ranks(adapter[n])) is not None}
    )
    alike = target.uniform or target.consumer or FORMATS[how.format or adapter.meta.format].one_rank
    return budget.uniform() if alike else budget.shared(spectra)


class Storage(NamedTuple):
    """How the result is written, and whether modules that are not finite are passed over."""

    dtype: str | None
    format: str | None
    allow_nonfinite: bool


def _spectra(adapter: Adapter, allow_nonfinite: bool, weighing: Weighing | None) -> dict[str, Array]:
    """Return the singular values of every update that can be squeezed, weighted where there are statistics.

    All experts of a stack have one rank, so that their squared values add up, the largest with the largest.
    """
    found: dict[str, Array] = {}

    def note(name: str, update: Update) -> Update:
        directions = low_ranks(update)
        if directions is not None:
            try:
                if weighing is not None and name in weighing:
                    values = [weighing.svdvals(name, d) for d in directions]
                else:
                    values = [generic.svdvals(d) for d in directions]
            except NumericsError:
                if allow_nonfinite:
                    return update
                raise
            xp = namespace(*values)
            found[name] = values[0] if len(values) == 1 else xp.linalg.vector_norm(xp.stack(values), axis=0)
        return update

    adapter.map(note)
    return {name: found[name] for name in adapter if name in found}


class _Budget:
    """A limit on the bytes of the written file, its header and carried tensors included."""

    def __init__(
        self,
        adapter: Adapter,
        target: Target,
        dtype: str | None,
        format: str | None,
        directions: Mapping[str, Sequence[LowRank]],
    ) -> None:
        assert target.size is not None
        self.adapter, self.target, self.dtype, self.format = adapter, target, dtype, format
        self.directions, self.size = directions, target.size

    def shared(self, spectra: Mapping[str, Array]) -> dict[str, int]:
        """Share the budget out by error saved per byte; the header's own length is settled by measuring it."""
        modules = {n: Module([float(x) ** 2 for x in s], self._cost(n)) for n, s in spectra.items()}
        least = {n: min(self.target.multiple, len(m.energies)) for n, m in modules.items()}
        overhead = 0
        while True:
            budget = self.size - overhead
            ranks = allocate(modules, budget, step=self.target.multiple, cap=self.target.cap) or least
            written = self._written(ranks)
            if written <= self.size:
                return ranks
            if ranks == least:
                raise self._impossible(least)
            overhead = max(overhead + 1, written - sum(ranks[n] * m.cost for n, m in modules.items()))

    def uniform(self) -> dict[str, int]:
        """Return the largest rank for all that fits."""
        top = min(max(d.rank for ds in self.directions.values() for d in ds), self.target.cap)
        choices = sorted({self.target.one_for_all({"": self.target.rounded(k)}) for k in range(1, top + 1)})
        fitting = [k for k in choices if self._written(dict.fromkeys(self.directions, k)) <= self.size]
        if not fitting:
            raise self._impossible(dict.fromkeys(self.directions, choices[0]))
        return dict.fromkeys(self.directions, fitting[-1])

    def _cost(self, name: str) -> int:
        """Bytes of one more rank: a column of b and a row of a, of every expert."""
        return sum(
            m * ITEMSIZE[self.dtype or dtype_name(u.b)] + n * ITEMSIZE[self.dtype or dtype_name(u.a)]
            for u in self.directions[name]
            for m, n in [u.matrix_shape]
        )

    def _written(self, ranks: Mapping[str, int], target: Target | None = None) -> int:
        """Return the bytes of the file that these ranks would give, from shapes alone; its history names the target."""
        updates = {n: self._hollow(n, u, ranks[n]) if n in ranks else u for n, u in self.adapter.items()}
        hollow = replace(self.adapter, updates=updates).with_history(f"squeeze {(target or self.target).words}")
        return written_size(hollow, format=self.format)

    def _hollow(self, name: str, update: Update, rank: int) -> Update:
        """Return the update with factors that have shapes and dtypes but no values."""
        return with_low_ranks(update, [self._hollow_pair(u, rank) for u in self.directions[name]])

    def _hollow_pair(self, u: LowRank, rank: int) -> LowRank:
        m, n = u.matrix_shape
        b = Leaf((m, rank), self.dtype or dtype_name(u.b), _nothing)
        a = Leaf((rank, n), self.dtype or dtype_name(u.a), _nothing)
        return LowRank(b, a, 1.0, u.shape)

    def _impossible(self, least: Mapping[str, int]) -> UsageError:
        size = self._written(least)
        while (longer := self._written(least, replace(self.target, size=size))) > size:
            size = longer  # the file tells its size in its history, at the length of that number
        return UsageError(
            "no adapter of these modules is as small as that",
            expected=f"at least {size} bytes",
            got=f"{self.size} bytes",
            hint="every module keeps at least one rank; --dtype float16 halves fp32 factors",
        )


def _nothing(out: Array | None) -> Array:
    raise UsageError(
        "--size cannot be planned for this format: what it writes depends on the values",
        hint="use --rank, --energy or --error; or convert the adapter to peft first",
    )
