"""Models in several files: the index, and what it may name."""

from __future__ import annotations

import re
from pathlib import Path

from loratools.errors import FormatError
from loratools.io.directory import INDEX, STATE, file_names
from loratools.io.oserrors import os_errors
from loratools.io.sidecar import read_json

PREFERRED = ("model", "diffusion_pytorch_model", "adapter_model", "pytorch_model")
BIN_INDEX = ".bin.index.json"
_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(safetensors|bin)")


def read_index(path: Path) -> dict[str, Path]:
    """Return name -> shard file as the index says, in its order.

    FormatError if the index has no ``weight_map`` of text, or names a file outside its own directory (``..``, an
    absolute path, a link that leads out of it) or one that is not there. A Hugging Face cache, whose links lead to
    the ``blobs`` folder beside ``snapshots``, is inside.
    """
    table = read_json(path).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(file, str) for file in table.values()):
        raise FormatError("the index has no weight_map of names and files", file=path, expected='{"weight_map": {...}}')
    shards = {file: _inside(path, file) for file in dict.fromkeys(table.values())}
    return {name: shards[file] for name, file in table.items()}


def _inside(index: Path, file: str) -> Path:
    folder = index.parent
    leaves = not file or Path(file).is_absolute() or ".." in Path(file).parts or "\\" in file or "\0" in file
    if not leaves:
        with os_errors("read the index", index):
            target, home = (folder / file).resolve(), folder.resolve()
        roots = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
        leaves = not any(target.is_relative_to(root) for root in roots)
    if leaves:
        raise FormatError(
            "the index names a file outside its directory",
            file=index,
            expected="plain file names",
            got=file,
            hint="the index is damaged or hostile: fetch the model again",
        )
    if not (folder / file).is_file():
        raise FormatError("a shard is missing", file=index, expected=file, hint="download the missing file")
    return folder / file


def model_files(folder: Path) -> tuple[Path, ...] | Path:
    """Return the weights of a model directory: its index file, or its files in order.

    An index first (``model`` or ``diffusion_pytorch_model`` before variants), then the single file of that name, then
    a complete set of numbered shards, then all safetensors files, last pickles. FormatError if shards are missing, or
    if nothing or more than one thing may be meant. Adapter files beside a model do not count.
    """
    names = {name for name in file_names(folder) if not name.startswith(("adapter_model", "adapters.", *STATE))}
    for index_suffix, suffix in ((INDEX, ".safetensors"), (BIN_INDEX, ".bin")):
        indices = sorted(name for name in names if name.endswith(index_suffix))
        if indices:
            return folder / _chosen(folder, indices, index_suffix)
        for stem in PREFERRED:
            if stem + suffix in names:
                return (folder / (stem + suffix),)
        loose = sorted(name for name in names if name.endswith(suffix))
        if loose:
            _check_complete(folder, loose)
            return tuple(folder / name for name in loose)
    raise FormatError(
        "no model weights in the directory",
        file=folder,
        expected="model.safetensors, shards, or an index of shards",
        hint="give the directory of the full model, not of an adapter",
    )


def _chosen(folder: Path, indices: list[str], suffix: str) -> str:
    for stem in PREFERRED:
        if stem + suffix in indices:
            return stem + suffix
    if len(indices) > 1:
        raise FormatError(
            "the directory holds several models", file=folder, got=", ".join(indices), hint="name the index you mean"
        )
    return indices[0]


def _check_complete(folder: Path, names: list[str]) -> None:
    """FormatError if the files are numbered shards of which some are missing, or if sets of shards are mixed."""
    matches = [match for name in names if (match := _NUMBERED.fullmatch(name))]
    sets = {(match[1], match[3]) for match in matches}
    if sets and (len(sets) > 1 or len(matches) < len(names)):
        raise FormatError(
            "the directory holds several models", file=folder, got=", ".join(names[:5]), hint="name the file you mean"
        )
    for stem, count in sets:
        wanted = {f"{stem}-{i:05d}-of-{count}" for i in range(1, int(count) + 1)}
        if missing := sorted(wanted - {name.rpartition(".")[0] for name in names}):
            raise FormatError(
                f"{len(missing)} of {int(count)} shards are missing",
                file=folder,
                got=", ".join(missing[:3]),
                hint="download the missing files",
            )
