"""Writing a model anew, shard by shard and block by block: the engine under merge and unmerge.

Memory is a few blocks per thread, whatever the size of the model: a tensor passes in ranges of rows, each read from its
place in the base, changed, and written to its place in the output.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from loratools.core import pool
from loratools.core.rows import row_ranges
from loratools.core.update import Array
from loratools.errors import LoratoolsError
from loratools.io.base import Base
from loratools.io.output import write_all
from loratools.io.read import open_bundle, read_json
from loratools.io.save_like import Shard, copy_tensor, layout_like, write_array
from loratools.io.staging import Staging
from loratools.io.write import Layout, TensorPlan, write_safetensors
from loratools.leaf import Leaf
from loratools.linalg.namespace import dtype_name, namespace, to_numpy

RANGE_BYTES = 16 << 20  # of the output: given to one thread at a time
BLOCK = 1 << 18  # elements changed at once: what is made of them stays in the cache
_TURN = Lock()  # one parameter at a time is on a GPU; others are read and written meanwhile


@dataclass
class Figures:
    """What a block tells: ``sums`` add up over the blocks of a tensor, ``vectors`` are put one after another."""

    sums: dict[str, float] = field(default_factory=dict)
    vectors: dict[str, Array] = field(default_factory=dict)


Block = Callable[[Leaf | None, int, int], tuple[Array, Figures]]
"""``block(rows of the source, start, stop)`` is the new rows in their storage dtype, and figures."""


@dataclass(frozen=True)
class Change:
    """A tensor to be written: its form, what it is made of, and how.

    ``rows(start, stop)`` reads what these rows share and returns the function for blocks of them; a ``whole`` tensor
    comes as one block. One that is ``away`` (and whole) is changed on a GPU, when no other one is there.
    """

    plan: TensorPlan
    source: Leaf | None
    rows: Callable[[int, int], Block]
    whole: bool = False
    away: bool = False


class _Task(NamedTuple):
    name: str
    start: int
    stop: int
    nbytes: int


def rewrite(base: Base, shards: Sequence[Shard], changes: Mapping[str, Change], staging: Staging) -> dict[str, Figures]:
    """Write every shard that ``staging`` lacks; return the figures of every changed tensor.

    Tensors without a change are copied byte for byte. A shard appears complete, forced to the disk, or not at all.
    """
    whole, done = sum(shard.nbytes for shard in shards), 0
    figures: dict[str, Figures] = {}
    pool.keep_freed_memory()
    for shard in shards:
        with pool.part(done, whole):
            if not (staging.has(shard.name) and staging.has(_sidecars(shard)[0])):  # its figures go first at the end
                _write_shard(base, shard, changes, staging)
        figures.update(_told(shard, staging))
        done += shard.nbytes
    return figures


def internal_files(shards: Sequence[Shard]) -> tuple[str, ...]:
    """Return the files of the staging directory that are not part of the output."""
    return tuple(name for shard in shards for name in _sidecars(shard))


def _write_shard(base: Base, shard: Shard, changes: Mapping[str, Change], staging: Staging) -> None:
    laid, path = layout_like(shard), staging.path / shard.name
    tasks = [task for tensor in shard.plan for task in _tasks(tensor, changes.get(tensor.name))]
    with staging.file(shard.name) as fd:
        write_all(fd, memoryview(laid.header), 0, path)
        found = pool.parallel_map(
            lambda task: _run(task, base, changes, laid, fd, path), tasks, weights=[task.nbytes for task in tasks]
        )
        _tell(shard, _joined(tasks, found), staging)


def _tasks(tensor: TensorPlan, change: Change | None) -> list[_Task]:
    if change is None or change.whole or not tensor.shape or 0 in tensor.shape or not _in_parts(change.source):
        return [_Task(tensor.name, 0, tensor.shape[0] if tensor.shape else 1, tensor.nbytes)]
    rows = row_ranges(Leaf(tensor.shape, tensor.dtype, lambda out: out), RANGE_BYTES)
    return [_Task(tensor.name, i, j, tensor.nbytes * (j - i) // tensor.shape[0]) for i, j in rows]


def _run(task: _Task, base: Base, changes: Mapping[str, Change], laid: Layout, fd: int, path: Path) -> Figures | None:
    change = changes.get(task.name)
    try:
        if change is None:
            copy_tensor(fd, base.leaf(task.name), laid.starts[task.name], path)
            return None
        return _change(task, change, laid.starts[task.name], fd, path)
    except LoratoolsError as error:
        raise error.at(parameter=task.name) from error


def _change(task: _Task, change: Change, offset: int, fd: int, path: Path) -> Figures:
    plan = change.plan
    row = plan.nbytes // max(plan.shape[0], 1) if plan.shape else plan.nbytes
    block, total = change.rows(task.start, task.stop), []
    for start, stop in _blocks(task, plan, change.whole):
        source = change.source if change.whole or not plan.shape else _part(change.source, start, stop)
        array, figures = (_away if change.away else _here)(block, source, start, stop)
        assert dtype_name(array) == plan.dtype  # of the plan that was written into the header
        write_array(fd, array, offset + start * row, path)
        total.append(figures)
    return _sum(total)


def _here(block: Block, source: Leaf | None, start: int, stop: int) -> tuple[Array, Figures]:
    return block(source, start, stop)


def _away(block: Block, source: Leaf | None, start: int, stop: int) -> tuple[Array, Figures]:
    """Change a block on a GPU: it is read before its turn, and all of it is back in memory after it."""
    if source is not None:
        held = source.read()
        source = Leaf(source.shape, source.dtype, lambda out: held)
    with _TURN:
        array, figures = block(source, start, stop)
        return to_numpy(array), Figures(figures.sums, {key: to_numpy(v) for key, v in figures.vectors.items()})


def _in_parts(source: Leaf | None) -> bool:
    """False for a source that can only be read as a whole: reading it once per range would multiply the work."""
    return source is None or hasattr(source.load, "rows")


def _part(source: Leaf | None, start: int, stop: int) -> Leaf | None:
    return None if source is None else source.rows(start, stop)


def _blocks(task: _Task, plan: TensorPlan, whole: bool) -> list[tuple[int, int]]:
    if whole or not plan.shape:
        return [(task.start, task.stop)]
    elements = 1
    for size in plan.shape[1:]:
        elements *= size
    step = max(1, BLOCK // max(elements, 1))
    return [(i, min(i + step, task.stop)) for i in range(task.start, task.stop, step)]


def _joined(tasks: Sequence[_Task], found: Sequence[Figures | None]) -> dict[str, Figures]:
    """Return the figures per tensor; tasks lie in the order of their rows."""
    parts: dict[str, list[Figures]] = {}
    for task, figures in zip(tasks, found, strict=True):
        if figures is not None:
            parts.setdefault(task.name, []).append(figures)
    return {name: _sum(figures) for name, figures in parts.items()}


def _sum(parts: Sequence[Figures]) -> Figures:
    sums: dict[str, float] = {}
    for part in parts:
        for key, value in part.sums.items():
            sums[key] = sums.get(key, 0.0) + value
    keys = parts[0].vectors if parts else ()
    return Figures(sums, {key: _concat([part.vectors[key] for part in parts]) for key in keys})


def _concat(arrays: Sequence[Array]) -> Array:
    return arrays[0] if len(arrays) == 1 else namespace(arrays[0]).concat(list(arrays))


def _sidecars(shard: Shard) -> tuple[str, str]:
    return f"{shard.name}.figures.json", f"{shard.name}.vectors"


def _tell(shard: Shard, figures: Mapping[str, Figures], staging: Staging) -> None:
    """Keep the figures of a shard beside it, so that a continued job can tell all of them."""
    numbers, vectors = _sidecars(shard)
    arrays = {f"{name}\n{key}": v for name, f in figures.items() for key, v in f.vectors.items()}
    if arrays:
        plan = [TensorPlan(key, dtype_name(array), tuple(array.shape)) for key, array in arrays.items()]
        write_safetensors(staging.path / vectors, plan, arrays.items(), overwrite=True)
    staging.write_text(numbers, json.dumps({name: f.sums for name, f in figures.items()}))


def _told(shard: Shard, staging: Staging) -> dict[str, Figures]:
    numbers, vectors = (staging.path / name for name in _sidecars(shard))
    found = {name: Figures(sums) for name, sums in read_json(numbers).items()}
    if vectors.is_file():
        for key, leaf in open_bundle(vectors).tensors.items():
            name, _, what = key.partition("\n")
            found[name].vectors[what] = leaf.read()
    return found
