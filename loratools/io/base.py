"""A base model on disk or in memory: headers first, tensors on demand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from loratools.errors import MismatchError
from loratools.io.bundle import memory_leaf
from loratools.io.names import resolve
from loratools.io.read import existing, read_json
from loratools.io.shards import model_files
from loratools.io.weights import Contents, open_index, open_shards
from loratools.leaf import Array, Leaf

CONFIG = "config.json"


class Base(Mapping[str, Array]):
    """Mapping parameter name -> array, read when asked for; ``leaf(name)`` is the handle.

    ``shapes``, ``dtypes`` and ``files`` (name -> weights file, in the order of the files and of the bytes in them;
    empty in memory) cost nothing; ``metadata`` is per file; ``config`` is ``config.json`` (empty if there is none).
    """

    def __init__(
        self,
        leaves: Mapping[str, Leaf],
        *,
        config: Mapping[str, Any] | None = None,
        files: Mapping[str, Path] | None = None,
        metadata: Mapping[Path, Mapping[str, str]] | None = None,
        path: Path | None = None,
    ) -> None:
        self._leaves = leaves
        self.config: Mapping[str, Any] = config or {}
        self.files: Mapping[str, Path] = files or {}
        self.metadata: Mapping[Path, Mapping[str, str]] = metadata or {}
        self.path = path
        self.shapes: Mapping[str, tuple[int, ...]] = {name: leaf.shape for name, leaf in leaves.items()}
        self.dtypes: Mapping[str, str] = {name: leaf.dtype for name, leaf in leaves.items()}

    @classmethod
    def open(cls, source: Base | str | Path | Mapping[str, Array]) -> Base:
        """Open a weights file, a model directory (one file, an index of shards, or shards alone) or a mapping.

        A ``config.json`` alone gives a base without parameters: enough where only the model's build is asked for.

        Cost: the headers. Raises FileError and FormatError as :func:`loratools.io.read.open_bundle`, and FormatError
        for an index that leaves its directory, for missing shards, and for a tensor stored twice.
        """
        if isinstance(source, Base):
            return source
        if isinstance(source, Mapping):
            return cls({name: memory_leaf(name, array) for name, array in source.items()})
        path = existing(Path(source))
        if path.name == CONFIG and path.is_file():
            return cls({}, config=read_json(path), path=path)
        shards = _open(model_files(path) if path.is_dir() else path, path)
        config = (path if path.is_dir() else path.parent) / CONFIG
        return cls(
            {name: leaf for contents in shards.values() for name, leaf in contents.tensors.items()},
            config=read_json(config) if config.is_file() else None,
            files={name: file for file, contents in shards.items() for name in contents.tensors},
            metadata={file: contents.metadata for file, contents in shards.items()},
            path=path,
        )

    @property
    def identity(self) -> str:
        """sha256 (hex) of the sorted names with shapes and dtypes: equal for equally built models, values aside."""
        import hashlib  # loads OpenSSL: most runs do not need it

        lines = (f"{name}\t{self.dtypes[name]}\t{self.shapes[name]}\n" for name in sorted(self._leaves))
        return hashlib.sha256("".join(lines).encode("utf-8", "surrogatepass")).hexdigest()

    def leaf(self, name: str) -> Leaf:
        """Return the handle of a parameter; KeyError if there is none."""
        return self._leaves[name]

    def resolve(self, names: Iterable[str], optional: Iterable[str] = frozenset()) -> dict[str, str]:
        """Return adapter name -> base name, one to one: see :func:`loratools.io.names.resolve`.

        Names in ``optional`` are left out where the base lacks them. Raises MismatchError naming the file.
        """
        try:
            return resolve(names, self._leaves, optional)
        except MismatchError as error:
            raise error.at(file=self.path) from None

    def __getitem__(self, name: str) -> Array:
        return self._leaves[name].read()

    def __contains__(self, name: object) -> bool:
        return name in self._leaves

    def __iter__(self) -> Iterator[str]:
        return iter(self._leaves)

    def __len__(self) -> int:
        return len(self._leaves)

    __eq__ = object.__eq__  # comparing mappings would read both models
    __hash__ = object.__hash__


def _open(files: Path | tuple[Path, ...], told_by: Path) -> dict[Path, Contents]:
    if isinstance(files, tuple):
        return open_shards(files, told_by)
    return open_index(files) if files.name.endswith(".index.json") else open_shards([files], told_by)
