"""Statistics files: second moments of what the modules of a model see.

A safetensors file with, for each module, any of

``<module>.in_diag``   (n,)     mean of x_j^2 over the inputs x of the module
``<module>.in_gram``   (n, n)   mean of x x^T; where it is given it counts, and in_diag is its diagonal
``<module>.out_diag``  (m,)     mean of g_i^2 over the gradients g of its outputs

Modules bear their names in the model (``model.layers.0.self_attn.q_proj``). Any positive multiple of the means serves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from loratools.errors import FormatError, LoratoolsError, MismatchError
from loratools.io.bundle import memory_leaf
from loratools.io.dtypes import to_numpy
from loratools.io.names import resolve
from loratools.io.read import existing
from loratools.io.weights import read_file
from loratools.io.write import TensorPlan, write_safetensors
from loratools.leaf import Array, Leaf

FORMAT = "loratools.stats"


@dataclass(frozen=True)
class Stats:
    """Statistics of one module, as leaves; see the module's docstring for what they mean."""

    in_diag: Leaf | None = None
    in_gram: Leaf | None = None
    out_diag: Leaf | None = None

    @property
    def inputs(self) -> Leaf | None:
        """What is known of the inputs: the Gram matrix, else its diagonal, else nothing."""
        return self.in_gram if self.in_gram is not None else self.in_diag


KEYS = tuple(field.name for field in fields(Stats))


class Collected(Mapping[str, Stats]):
    """Module name -> :class:`Stats`, in the order of the file; tensors are read when used."""

    def __init__(self, modules: Mapping[str, Stats], path: Path | None = None) -> None:
        self._modules = dict(modules)
        self.path = path

    def resolve(self, names: Iterable[str]) -> dict[str, str]:
        """Return parameter name -> module for the parameters whose modules have statistics.

        Names are matched as an adapter's are to those of a base (:func:`loratools.io.names.resolve`). Raises
        MismatchError where none matches.
        """
        wanted = list(names)
        known = {f"{module}.weight": module for module in self._modules} | {module: module for module in self._modules}
        try:
            found = resolve(wanted, known, wanted)
        except MismatchError as error:
            raise error.at(file=self.path) from None
        if wanted and not found:
            raise MismatchError(
                "the statistics are of no module of the adapter", file=self.path,
                expected=", ".join(wanted[:3]), got=", ".join(list(self._modules)[:3]) or "none at all",
                hint="collect them on the model that the adapter was trained on",
            )  # fmt: skip
        return {name: known[target] for name, target in found.items()}

    def __getitem__(self, module: str) -> Stats:
        return self._modules[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


StatsLike = Collected | str | Path | Mapping[str, Array] | Mapping[str, Stats]


def load_stats(source: StatsLike) -> Collected:
    """Open statistics: a file, or a mapping of its keys to arrays (or of modules to :class:`Stats`).

    Cost: the header and the vectors; matrices are read when used. Raises FormatError for keys, dtypes and shapes that
    are no statistics and for vectors with NaN, infinite or negative entries, FileError as every reader.
    """
    if isinstance(source, Collected):
        return source
    if isinstance(source, Mapping):
        held = {k: v if isinstance(v, Stats | Leaf) else memory_leaf(k, v) for k, v in source.items()}
        given = {k: v for k, v in held.items() if isinstance(v, Stats)}
        found = Collected(given or _sorted({k: v for k, v in held.items() if isinstance(v, Leaf)}))
    else:
        path = existing(Path(source))
        if path.is_dir():
            raise FormatError("statistics are one safetensors file", file=path, got="a directory")
        try:
            contents = read_file(path)
            if contents.container != "safetensors":
                raise FormatError("statistics are a safetensors file", got=contents.container)
            found = Collected(_sorted(contents.tensors), path)
        except LoratoolsError as error:
            raise error.at(file=path) from error.__cause__
    for module, stats in found.items():
        _check(module, stats, found.path)
    return found


def save_stats(
    stats: Mapping[str, Stats], path: str | Path, *, metadata: Mapping[str, str] | None = None, overwrite: bool = False
) -> Path:
    """Write statistics to a safetensors file, complete or not at all; return its path."""
    leaves = {f"{m}.{key}": leaf for m, one in stats.items() for key in KEYS if (leaf := getattr(one, key)) is not None}
    plan = [TensorPlan(name, leaf.dtype, tuple(leaf.shape)) for name, leaf in leaves.items()]
    said = {FORMAT: "1", **(metadata or {})}
    chunks = ((name, leaf.read()) for name, leaf in leaves.items())
    return write_safetensors(path, plan, chunks, metadata=said, overwrite=overwrite)


def _sorted(tensors: Mapping[str, Leaf]) -> dict[str, Stats]:
    """Return module -> statistics. Raises FormatError naming the keys that are none."""
    parts: dict[str, dict[str, Leaf]] = {}
    unknown = []
    for key, leaf in tensors.items():
        module, _, what = key.rpartition(".")
        if what in KEYS and module:
            parts.setdefault(module, {})[what] = leaf
        else:
            unknown.append(key)
    if unknown:
        raise FormatError(
            f"{len(unknown)} of {len(tensors)} tensors are no statistics",
            expected=", ".join(f"<module>.{key}" for key in KEYS), got=", ".join(unknown[:3]),
        )  # fmt: skip
    return {module: Stats(**found) for module, found in parts.items()}


def _check(module: str, stats: Stats, path: Path | None) -> None:
    for key in KEYS:
        leaf = getattr(stats, key)
        if leaf is None:
            continue
        square = len(leaf.shape) == 2 and leaf.shape[0] == leaf.shape[1]
        if not (square if key == "in_gram" else len(leaf.shape) == 1) or 0 in leaf.shape:
            expected = "a square matrix" if key == "in_gram" else "a vector"
            raise FormatError(
                f"{key} has the wrong shape", file=path, parameter=module, expected=expected, got=leaf.shape
            )
        if not leaf.dtype.startswith(("float", "bfloat")):
            raise FormatError(f"{key} is not floating", file=path, parameter=module, got=leaf.dtype)
        if key != "in_gram":
            values = to_numpy(leaf.read()).astype(np.float64)
            if not np.isfinite(values).all() or (values < 0).any():
                raise FormatError(
                    f"{key} has entries that no mean of squares has", file=path, parameter=module,
                    expected="finite and not negative", hint="collect the statistics again",
                )  # fmt: skip
    sizes = {leaf.shape[0] for leaf in (stats.in_diag, stats.in_gram) if leaf is not None}
    if len(sizes) > 1:
        raise FormatError("in_diag and in_gram disagree on the inputs", file=path, parameter=module, got=sorted(sizes))
