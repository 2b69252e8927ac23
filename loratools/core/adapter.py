"""The collection: a structured delta of a state dict."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from loratools.core.pool import parallel_map
from loratools.core.update import Update, is_tensor, nbytes, tensors
from loratools.errors import LoratoolsError
from loratools.leaf import Array, Leaf
from loratools.linalg.namespace import device_of, dtype_name, to_device
from loratools.report import Report

ONE = 1  # byte: a batch holds at least one update
CPU_BATCH_BYTES = 1 << 20  # small updates share the cost of calls; larger ones go alone, and the pool balances the load


class Absorbed(NamedTuple):
    """The tensors of a file (by key) that ``update`` says in a simpler form; as long as it is the same object."""

    update: Update
    tensors: Mapping[str, Leaf | Array]


@dataclass(frozen=True)
class Meta:
    """What a file said beyond its updates; operations carry it and never look inside.

    ``layout[name]`` is how the source format wrote the update (its writer undoes the reading); ``leftover`` are
    tensors carried untouched under their own keys; ``remarks`` are oddities worth telling; ``history`` is one line per
    operation. ``scaled`` is false where a file does not say how strongly its factors act (then 1 stands for it).
    ``absorbed`` keeps the file's own tensors of updates that hold less than it said, for writing them back unchanged;
    ``unmergeable`` is parameter name -> why its update cannot be added to a base weight.
    """

    format: str = "native"
    namespace: str = ""
    base_id: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    layout: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    leftover: Mapping[str, Leaf | Array] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    history: tuple[str, ...] = ()
    path: Path | None = None
    siblings: tuple[Path, ...] = ()
    readme: Path | None = None
    origin: str = ""
    scaled: bool = True
    absorbed: Mapping[str, Absorbed] = field(default_factory=dict)
    unmergeable: Mapping[str, str] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """The format in whose words config, metadata and layout speak: the file's own, or what a native file kept."""
        return self.origin or self.format


@dataclass(frozen=True)
class Adapter(Mapping[str, Update]):
    """Ordered mapping *parameter name -> Update*, as in the source; ``report`` is the last operation's."""

    updates: Mapping[str, Update]
    meta: Meta = field(default_factory=Meta)
    report: Report | None = field(default=None, compare=False)

    def __getitem__(self, name: str) -> Update:
        return self.updates[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.updates)

    def __len__(self) -> int:
        return len(self.updates)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in their storage dtypes, the carried ones included."""
        return sum(nbytes(u) for u in self.values()) + sum(int(t.nbytes) for t in self.meta.leftover.values())

    def map(self, f: Callable[[str, Update], Update]) -> Adapter:
        """Apply ``f(name, update)`` to every update, in parallel on a CPU; errors name the parameter."""
        return self.map_groups(lambda names, us: [f(n, u) for n, u in zip(names, us, strict=True)], limit_bytes=ONE)

    def map_groups(
        self,
        f: Callable[[Sequence[str], Sequence[Update]], Sequence[Update]],
        *,
        key: Callable[[Update], Hashable] | None = None,
        limit_bytes: int | None = None,
    ) -> Adapter:
        """Apply ``f`` to batches of updates with equal ``key`` of at most ``limit_bytes``; the only place of batching.

        By default updates on an accelerator are batched by kind and dtypes in chunks of 1 GiB (kernels take different
        shapes in one launch), and updates on the CPU go through a thread pool, those of less than 1 MB together. The
        result keeps the order of the adapter. An error of a batch of one names its parameter.
        """
        on_cpu = all(device_of(t) == "cpu" for u in self.values() for _, t in tensors(u) if not isinstance(t, Leaf))
        limit = limit_bytes or (CPU_BATCH_BYTES if on_cpu else 1 << 30)
        sizes = {name: nbytes(u) for name, u in self.items()}
        batches = _batches(self.updates, sizes, key or _same_form, limit)

        def run(batch: Sequence[str]) -> Sequence[Update]:
            try:
                return f(batch, [self[name] for name in batch])
            except LoratoolsError as error:
                raise error.at(file=self.meta.path, parameter=batch[0] if len(batch) == 1 else None) from error

        done = parallel_map(run, batches, weights=[sum(map(sizes.__getitem__, b)) for b in batches], threaded=on_cpu)
        results = {n: u for batch, us in zip(batches, done, strict=True) for n, u in zip(batch, us, strict=True)}
        return replace(self, updates={name: results[name] for name in self})

    def to(self, device: str) -> Adapter:
        """Return the adapter with every tensor in memory on ``device``: the one entry to a GPU."""
        return replace(self, updates={name: _moved(u, device) for name, u in self.items()})

    def with_history(self, line: str) -> Adapter:
        """Append one line to the adapter's history, which its file will tell."""
        return replace(self, meta=replace(self.meta, history=(*self.meta.history, line)))


def _same_form(u: Update) -> Hashable:
    return type(u), tuple(dtype_name(t) for _, t in tensors(u))


def _batches(
    updates: Mapping[str, Update], sizes: Mapping[str, int], key: Callable[[Update], Hashable], limit: int
) -> list[list[str]]:
    """Group names by key, in order of first appearance, in chunks of at most ``limit`` bytes (at least one update)."""
    open_batches: dict[Hashable, tuple[list[str], int]] = {}
    batches: list[list[str]] = []
    for name, u in updates.items():
        k, size = key(u), sizes[name]
        batch, total = open_batches.get(k, ([], 0))
        if not batch or total + size > limit:
            batch, total = [], 0
            batches.append(batch)
        batch.append(name)
        open_batches[k] = (batch, total + size)
    return batches


def _moved(value: Any, device: str) -> Any:
    """Rebuild a kind with all its tensors on the device; leaves are read (half types become fp32 only on use)."""
    if isinstance(value, Update):
        return replace(value, **{f.name: _moved(getattr(value, f.name), device) for f in fields(value)})  # type: ignore
    if isinstance(value, tuple) and value and isinstance(value[0], Update):
        return tuple(_moved(part, device) for part in value)
    if is_tensor(value):
        return to_device(value.read() if isinstance(value, Leaf) else value, device)
    return value


__all__ = ["Absorbed", "Adapter", "Meta"]
