"""compare: how alike adapters are, where they collide, and what to fuse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod

from loratools.core import pool
from loratools.core.adapter import Adapter
from loratools.core.pool import parallel_map, thread_count
from loratools.core.update import Delta, Update, nbytes, tensors
from loratools.errors import LoratoolsError, MismatchError, UsageError
from loratools.files import BaseLike, open_base
from loratools.io.base import Base
from loratools.kinds.lowrank import LowRank, low_ranks
from loratools.kinds.stack import Stack
from loratools.ops.compare_bases import FULL_RANK, Bases, bases
from loratools.ops.compare_pairs import Table, added, cell, joined, spread, turned
from loratools.ops.compare_signs import MOST
from loratools.ops.compare_words import compare_report
from loratools.ops.fuse_inputs import (
    Row,
    check_bases,
    check_coats,
    check_common,
    is_whole,
    labels,
    rows_of,
    settled,
    true_updates,
)
from loratools.ops.parts import layer_and_projection
from loratools.ops.sparse_interference import with_sparse
from loratools.report import Report

BLOCK_BYTES = 32 << 20
"""Bases of adapters held at a time, for each side of a pair and each thread."""


def compare(
    adapters: Sequence[Adapter],
    *,
    base: BaseLike | None = None,
    same_base: bool = False,
    sample: int = 1 << 18,
    seed: int = 0,
) -> Report:
    """Return, for every pair of adapters, how their updates relate, in total and per group of modules.

    Per pair: ``cosine`` of the updates, mean and smallest principal ``angle`` of output and input spaces, the share of
    one's energy inside the other's subspaces, ``sign_conflict`` on a fixed sample of at most ``sample`` entries per
    module, ``interference``, for sparse adapters also SHiRA's AWOM and AWOR; a similarity graph with communities (by
    ``seed``), and a recommendation in plain words. A group is a projection (``self_attn.q_proj``) over all layers; a
    module that one lacks counts as zero. DoRA is compared as its true update on ``base``.

    Cost O((m + n) r^2 + r^3) per pair and module, nothing dense; memory is bounded by blocks of adapters. Raises
    UsageError for a sample beyond 2^20, MismatchError for different bases, NeedsBaseError.
    """
    if not 1 <= sample <= MOST:
        raise UsageError("no such sample", expected=f"1 to {MOST} entries per module", got=sample)
    if not adapters:
        raise UsageError("nothing to compare", expected="at least one adapter")
    names, opened = labels(adapters), open_base(base)
    adapters, in_base = settled(adapters, opened)
    check_bases(adapters, names, same_base=same_base)
    remarks = [*check_common(adapters, names)]
    rows = rows_of(adapters)
    additive = {name: row for name, row in rows.items() if not is_whole(row)}
    check_coats(additive, opened)
    groups, held = _Work(opened, in_base, sample).done(additive)
    if held < 1:
        remarks.append(f"updates of full rank are compared by their {FULL_RANK} leading directions: "
                       f"at least {held:.1%} of the energy")  # fmt: skip
    aside = [name for name in rows if name not in additive]
    if aside:
        remarks.append(f"stored whole, not compared: {', '.join(aside[:3])} ({len(aside)})")
    report = compare_report(groups, names, len(additive), remarks, sample=sample, seed=seed)
    return with_sparse(report, additive, names, seed)


@dataclass(frozen=True)
class _Work:
    """Compares module after module, and adds up per group of modules."""

    base: Base | None
    in_base: Mapping[str, str]
    sample: int

    def done(self, rows: Mapping[str, Row]) -> tuple[dict[str, Table], float]:
        """Return the table of every group, added up in the rows' order, and the least share of energy held."""
        found: dict[str, Table] = {}
        names, step, held = list(rows), 4 * thread_count(), 1.0
        weights = {name: sum(nbytes(u) for u in row if u is not None) for name, row in rows.items()}
        before, whole = 0, sum(weights.values())
        for start in range(0, len(names), step):
            chunk = names[start : start + step]
            with pool.part(before, whole):
                done = parallel_map(lambda n: self._module(n, rows[n]), chunk, weights=[weights[n] for n in chunk])
            before += sum(weights[n] for n in chunk)
            for name, (table, share) in zip(chunk, done, strict=True):
                group = layer_and_projection(name)[1]
                found[group] = added(found[group], table) if group in found else table
                held = min(held, share)
        return found, held

    def _module(self, name: str, row: Row) -> tuple[Table, float]:
        """Return the table of one parameter over all adapters, and the least share of energy held."""
        try:
            places = [i for i, u in enumerate(row) if u is not None]
            blocks = _blocks(places, row)
            cells: list[list[Table]] = []
            held = 1.0
            for i, block in enumerate(blocks):
                mine = self._bases(name, [row[k] for k in block])
                held = min(held, *(b.held for b in mine))
                line = [turned(cells[j][i]) for j in range(i)]
                for other in blocks[i:]:
                    theirs = mine if other is block else self._bases(name, [row[k] for k in other])
                    line.append(_all_matrices(mine, theirs, self.sample))
                cells.append(line)
            return spread(joined(cells), places, len(row)), held
        except LoratoolsError as error:
            raise error.at(parameter=name) from error

    def _bases(self, name: str, row: Sequence[Update | None]) -> list[Bases]:
        """Return the bases of a block of adapters, one per matrix: a stack of experts has several."""
        deltas = [d for d in true_updates(name, tuple(row), self.base, self.in_base) if d is not None]
        matrices = [_matrices(d) for d in deltas]
        if len({len(m) for m in matrices}) > 1:
            raise MismatchError("a stack of experts meets an update that is none")
        return [bases(column) for column in zip(*matrices, strict=True)]


def _matrices(d: Delta) -> Sequence[Delta]:
    return (low_ranks(d) or (d,)) if isinstance(d, Stack) else (d,)


def _all_matrices(mine: Sequence[Bases], theirs: Sequence[Bases], sample: int) -> Table:
    """Return the table of a module: of its matrices together, the sample shared among them."""
    tables = [cell(x, y, max(1, sample // len(mine))) for x, y in zip(mine, theirs, strict=True)]
    return reduce(added, tables)


def _blocks(places: Sequence[int], row: Row) -> list[list[int]]:
    """Divide the adapters that have a module into blocks whose bases fit into the limit."""
    blocks: list[list[int]] = []
    room = 0
    for i in places:
        size = _basis_bytes(row[i])
        if size > room:
            blocks.append([])
            room = BLOCK_BYTES
        blocks[-1].append(i)
        room -= size
    return blocks


def _basis_bytes(u: Update | None) -> int:
    """Return about the bytes of an update's bases in fp32: as many entries as its factors have."""
    assert u is not None  # places are those that have the module
    entries = sum(prod(t.shape) for _, t in tensors(u))
    return 4 * (
        entries if isinstance(u, LowRank | Stack) else max(entries, FULL_RANK * (u.shape[0] + prod(u.shape[1:])))
    )
