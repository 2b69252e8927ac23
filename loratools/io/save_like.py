"""Writing a model like another one: the same files with the same names, order, dtypes and metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from pathlib import Path

import numpy as np

from loratools.io.base import Base
from loratools.io.directory import INDEX, README, belongs, file_names
from loratools.io.dtypes import as_bytes, to_numpy
from loratools.io.oserrors import os_errors
from loratools.io.output import write_all
from loratools.io.safetensors import read_header
from loratools.io.shards import BIN_INDEX, model_files
from loratools.io.sidecar import read_json
from loratools.io.write import Layout, TensorPlan, layout
from loratools.leaf import ITEMSIZE, Array, Leaf

SINGLE = "model.safetensors"
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Shard:
    """One file to be written: ``plan`` in the order of the bytes; ``source`` is the file it replaces, if any."""

    name: str
    plan: tuple[TensorPlan, ...]
    metadata: Mapping[str, str]
    source: Path | None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.plan)


def shards_like(
    base: Base,
    changed: Mapping[str, TensorPlan],
    added: Mapping[str, TensorPlan],
    dropped: frozenset[str] = frozenset(),
) -> tuple[Shard, ...]:
    """Return the files of a model like ``base`` with some tensors of another shape, added at the end, or dropped.

    Shards of other containers than safetensors become safetensors files of the corresponding name.
    """
    files: list[Path | None] = [*dict.fromkeys(base.files.values())] or [None]
    shards = [_shard(base, file, changed, dropped) for file in files]
    if added:
        shards[-1] = replace(shards[-1], plan=(*shards[-1].plan, *added.values()))
    return tuple(shards)


def layout_like(shard: Shard) -> Layout:
    """Return where every tensor of the shard lies: the source's own header, byte for byte, where it still holds.

    Otherwise the order is kept where that leaves every tensor aligned, and is the official serializer's if not.
    """
    if shard.source is None or shard.source.suffix != ".safetensors":
        return layout(shard.plan, shard.metadata)
    header = read_header(shard.source)
    now = {t.name: (t.dtype, t.shape) for t in shard.plan}
    if now == {name: (e.dtype, e.shape) for name, e in header.entries.items()}:
        starts = {name: entry.start for name, entry in header.entries.items()}
        return Layout(_head(shard.source), {t.name: t for t in shard.plan}, starts, shard.source.stat().st_size)
    offsets = list(accumulate((t.nbytes for t in shard.plan), initial=0))
    if any(start % ITEMSIZE[t.dtype] for t, start in zip(shard.plan, offsets, strict=False)):
        return layout(shard.plan, shard.metadata)
    return layout(shard.plan, shard.metadata, keep_order=True)


def index_like(base: Base, shards: Sequence[Shard]) -> tuple[str, str] | None:
    """Return (file name, text) of the index of the shards; None for a model in one file without an index."""
    old = index_of(base)
    if old is None and len(shards) == 1:
        return None
    said = {} if old is None else read_json(old)
    tensors = [tensor for shard in shards for tensor in shard.plan]
    where = {tensor.name: shard.name for shard in shards for tensor in shard.plan}
    order = [name for name in said.get("weight_map", {}) if name in where]
    metadata = {**(said.get("metadata") or {}), "total_size": sum(t.nbytes for t in tensors)}
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(prod(t.shape) for t in tensors)
    body = {**said, "metadata": metadata, "weight_map": {name: where[name] for name in dict.fromkeys([*order, *where])}}
    return _renamed(old.name if old is not None else SINGLE + ".index.json"), json.dumps(body, indent=2) + "\n"


def index_of(base: Base) -> Path | None:
    """Return the index file of a base on the disk, or None."""
    if base.path is None or base.path.name.endswith((INDEX, BIN_INDEX)):
        return base.path
    found = model_files(base.path) if base.path.is_dir() else None
    return found if isinstance(found, Path) else None


def small_files(base: Base) -> tuple[Path, ...]:
    """Return the small files beside a model in a directory that belong in a copy of it (README included), sorted."""
    if base.path is None:
        return ()
    folder = base.path if base.path.is_dir() else base.path.parent
    if not base.path.is_dir() and index_of(base) is None:
        return ()
    return tuple(folder / name for name in sorted(file_names(folder)) if belongs(folder / name) or name == README)


def _shard(base: Base, file: Path | None, changed: Mapping[str, TensorPlan], dropped: frozenset[str]) -> Shard:
    names = [name for name in base if base.files.get(name) == file and name not in dropped]
    plan = (changed.get(name) or TensorPlan(name, base.dtypes[name], base.shapes[name]) for name in names)
    metadata = {} if file is None else base.metadata.get(file, {})
    return Shard(SINGLE if file is None else _renamed(file.name), tuple(plan), metadata or {"format": "pt"}, file)


def _renamed(name: str) -> str:
    """Return the safetensors name of a pickled model's file: ``pytorch_model-1.bin`` -> ``model-1.safetensors``."""
    if name.endswith((".safetensors", INDEX)):
        return name
    stem = name.removesuffix(BIN_INDEX).removesuffix(".bin").removesuffix(".pt").removesuffix(".pth")
    stem = stem.replace("pytorch_model", "model")
    return stem + (INDEX if name.endswith(".index.json") else ".safetensors")


def _head(path: Path) -> bytes:
    with os_errors("read the file", path), path.open("rb", buffering=0) as file:
        length = int.from_bytes(os.pread(file.fileno(), 8, 0), "little")
        return os.pread(file.fileno(), 8 + length, 0)


def write_array(fd: int, array: Array, offset: int, path: Path) -> None:
    """Write the elements of an array, row-major, at a place of an open file."""
    write_all(fd, as_bytes(to_numpy(array)), offset, path)


def copy_tensor(fd: int, leaf: Leaf, offset: int, path: Path) -> None:
    """Copy the bytes of a stored tensor to a place of an open file, a megabyte at a time where it can be read so."""
    row = leaf.nbytes // leaf.shape[0] if leaf.shape and leaf.shape[0] else 0
    if not row or not hasattr(leaf.load, "rows"):
        write_array(fd, leaf.read(), offset, path)
        return
    step = max(1, _CHUNK_BYTES // row)
    buffer = np.empty(step * row, np.uint8)
    for start in range(0, leaf.shape[0], step):
        part = leaf.rows(start, min(start + step, leaf.shape[0]))
        write_array(fd, part.read(buffer), offset + start * row, path)
