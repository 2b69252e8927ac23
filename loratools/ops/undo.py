"""The undo file of a merge: what no adapter can tell about the base, so that :mod:`loratools.ops.unmerge` can.

A safetensors file: ``NAME\\ngain`` are the row factors of a DoRA (fp32), ``NAME\\noriginal`` base tensors that were
replaced or mixed; ``__metadata__["loratools.undo"]`` says to which merge they belong.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratools.core.adapter import Adapter
from loratools.core.update import Array, Delta, Leaf
from loratools.errors import FormatError
from loratools.io.base import Base
from loratools.io.read import open_bundle
from loratools.io.write import TensorPlan, write_safetensors
from loratools.linalg.namespace import dtype_name
from loratools.ops.job import content_hash
from loratools.ops.rewrite import Figures
from loratools.ops.targets import Target, Targets

KEY = "loratools.undo"


@dataclass(frozen=True)
class Undo:
    """An opened undo file: gains and originals by parameter, names that the merge added, fields of config.json."""

    gains: Mapping[str, Leaf]
    originals: Mapping[str, Leaf]
    added: tuple[str, ...] = ()
    config: Mapping[str, Any] | None = None
    adapters: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()


def save(
    path: Path,
    planned: Targets,
    figures: Mapping[str, Figures],
    base: Base,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    overwrite: bool,
) -> None:
    """Write the undo file of a merge; tensors of the base are read one by one."""
    tensors: dict[str, Leaf | Array] = {}
    for name, target in planned.changed.items():
        if target.source is None or name not in base or _additive(target):
            continue
        gain = figures[name].vectors.get("gain")
        tensors[f"{name}\ngain" if gain is not None else f"{name}\noriginal"] = (
            base.leaf(name) if gain is None else gain
        )
    said = {
        "version": 1,
        "adapters": [content_hash(adapter) for adapter in adapters],
        "weights": list(weights),
        "added": [name for name in planned.changed if name not in base],
        "config": {key: base.config.get(key) for key in planned.config},
    }
    plan = [TensorPlan(key, dtype_name(t), tuple(t.shape)) for key, t in tensors.items()]
    write_safetensors(path, plan, _read(tensors), metadata={KEY: json.dumps(said)}, overwrite=overwrite)


def load(path: str | Path) -> Undo:
    """Open an undo file. Raises FormatError for any other file."""
    bundle = open_bundle(path)
    if KEY not in bundle.metadata:
        raise FormatError("this is no undo file of a merge", file=path, expected=f"{KEY} in its metadata")
    said = json.loads(bundle.metadata[KEY])
    parts: dict[str, dict[str, Leaf]] = {"gain": {}, "original": {}}
    for key, leaf in bundle.tensors.items():
        name, _, what = key.partition("\n")
        parts[what][name] = leaf
    return Undo(
        parts["gain"], parts["original"], tuple(said["added"]), said["config"], tuple(said["adapters"]),
        tuple(said["weights"]),
    )  # fmt: skip


def _additive(target: Target) -> bool:
    return target.value is None and all(isinstance(t.update, Delta) for t in target.terms)


def _read(tensors: Mapping[str, Leaf | Array]) -> Iterator[tuple[str, Array]]:
    return ((key, t.read() if isinstance(t, Leaf) else t) for key, t in tensors.items())
