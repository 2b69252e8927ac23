"""Weights files of any readable container, one or several that belong together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from loratools.errors import FormatError
from loratools.io.safetensors import read_tensors
from loratools.io.shards import read_index
from loratools.io.sniff import GGUF, NPZ, SAFETENSORS, TORCH_ZIP, sniff
from loratools.leaf import Leaf


class Contents(NamedTuple):
    """What one weights file holds."""

    tensors: dict[str, Leaf]
    metadata: Mapping[str, str]
    container: str


def read_file(path: Path) -> Contents:
    """Open one weights file of any readable container."""
    container = sniff(path)
    if container == SAFETENSORS:
        return Contents(*read_tensors(path), "safetensors")
    if container == GGUF:
        from loratools.io.gguf import read_gguf

        return Contents(*read_gguf(path), "gguf")
    if container == NPZ:
        from loratools.io.npz import read_npz

        return Contents(*read_npz(path), "npz")
    from loratools.io.pickle import read_pickle

    return Contents(*read_pickle(path, zipped=container == TORCH_ZIP), "pickle")


def open_shards(files: Iterable[Path], told_by: Path) -> dict[Path, Contents]:
    """Open the files of a model in the order of their names; FormatError if two of them hold the same tensor."""
    shards = {path: read_file(path) for path in sorted(set(files))}
    seen: dict[str, Path] = {}
    for path, contents in shards.items():
        for name in contents.tensors:
            if name in seen:
                got = f"{seen[name].name} and {path.name}"
                raise FormatError(f"tensor {name!r} is stored twice", file=told_by, got=got)
            seen[name] = path
    return shards


def open_index(index: Path) -> dict[Path, Contents]:
    """Open the shards that an index names; FormatError if a tensor is not where the index says."""
    table = read_index(index)
    shards = open_shards(table.values(), index)
    lost = [name for name, path in table.items() if name not in shards[path].tensors]
    if lost:
        raise FormatError(
            f"{len(lost)} tensors of the index are not in the file it names",
            file=index,
            got=", ".join(lost[:3]),
            hint="the shards do not belong together: download the model again",
        )
    return shards
