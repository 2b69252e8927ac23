"""What commands do around an operation: read, place on a device, gate, save, show."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import click

from loratools import gates
from loratools.cli import _options, _show
from loratools.cli._options import Reading, Reporting, Running, Writing
from loratools.core import pool
from loratools.core.adapter import Adapter
from loratools.errors import MissingExtraError, UsageError
from loratools.files import load, rehearse, save
from loratools.io.base import Base
from loratools.outputs import check_target
from loratools.report import Report


def read(path: Path, reading: Reading, device: str = "cpu") -> tuple[Adapter, Base | None]:
    """Load the adapter and open the base; ``--base auto`` needs the adapter's own word for it first."""
    unknown, order = reading.allow_unknown, _options.expert_order()
    if reading.base == "auto":
        said = _said_base(path)
        if said is None:
            said = load(path, format=reading.format, allow_unknown=unknown, expert_order=order).meta.base_id
        opened: Base | None = Base.open(_cached(said))
    else:
        opened = None if reading.base is None else Base.open(reading.base)
    adapter = load(path, format=reading.format, base=opened, allow_unknown=unknown, expert_order=order)
    return place(device)(adapter), opened


def place(device: str) -> Callable[[Adapter], Adapter]:
    """Return what moves an adapter to where ``--device`` says. Raises UsageError for a GPU that is not there."""
    where = _device(device)
    return lambda adapter: adapter if where == "cpu" else adapter.to(where)


def _said_base(path: Path) -> str | None:
    """Return what the config beside the weights calls the base, before anything is decoded: that may need the base."""
    from loratools.formats.peft.config import base_name
    from loratools.io.sidecar import read_json

    config = (path if path.is_dir() else path.parent) / "adapter_config.json"
    return base_name(read_json(config)) if config.is_file() else None


def _cached(base_id: str | None) -> Path:
    from loratools.io.hub import cached_model

    if not base_id:
        raise UsageError("--base auto: the adapter does not name its base", hint="pass the base model's path")
    return cached_model(base_id)


def _device(asked: str) -> str:
    """Return ``cpu`` or ``cuda``; asking for a GPU that is not there is an error, ``auto`` takes what there is."""
    if asked == "cpu":
        return "cpu"
    try:
        import torch
    except ImportError:
        if asked == "auto":
            return "cpu"
        raise MissingExtraError("--device cuda needs torch", hint="pip install 'loratools[gpu]'") from None
    if torch.cuda.is_available():
        return "cuda"
    if asked == "auto":
        return "cpu"
    raise UsageError("--device cuda: torch sees no CUDA device", hint="use --device cpu")


@contextmanager
def working(running: Running, reporting: Reporting, *, total_bytes: int) -> Iterator[None]:
    """Set threads and show a progress bar on long work where a person watches stderr."""
    with (
        pool.threads(running.threads),
        _show.progress(total_bytes, enabled=not reporting.silent and sys.stderr.isatty()) as tell,
        pool.progress(tell),
    ):
        yield


class Target(NamedTuple):
    """Where a writing command puts its result, and how it tells about it."""

    path: Path
    writing: Writing
    reporting: Reporting

    def check(self, inputs: Sequence[Adapter]) -> None:
        """Raise before any work what saving would raise about the target."""
        if not self.writing.dry_run:
            for adapter in inputs:
                check_target(adapter, self.path, overwrite=self.writing.overwrite)


def deliver(
    result: Adapter,
    inputs: Sequence[Adapter],
    to: Target,
    gate: Sequence[gates.Gate],
    *,
    columns: Sequence[_show.Column],
    worst: str | None,
    base: Base | None = None,
    models: Sequence[Mapping[str, Any]] = (),
    more: Sequence[str] = (),
    **options: Any,
) -> int:
    """Judge the result's report by its gates, save it unless one fails, and show the report; return the exit code.

    ``models`` are the report's rows of inputs that are no adapters, ``more`` lines to print under the table;
    ``options`` go to :func:`loratools.files.save` (format, and what the format's writer takes).
    """
    assert result.report is not None
    report = gates.check(tuple(gate), result.report)
    failed = not all(check["ok"] for check in report.checks)
    if to.writing.dry_run:
        rehearse(result, base=base, **options)  # the writer refuses now what it would refuse then
    blocked = to.writing.dry_run or failed
    written = None if blocked else save(result, to.path, base=base, overwrite=to.writing.overwrite, **options)
    report = described(report, inputs, written, as_json=to.reporting.as_json)
    report = report.with_(inputs=(*report.inputs, *models))
    _show.show(report, to.reporting, worst=worst, columns=columns)
    if not to.reporting.silent:
        for line in more:
            click.echo(line)
        click.echo("nothing written" if written is None else f"wrote {written}")
    return int(failed)


def described(report: Report, adapters: Sequence[Adapter], output: Path | None, *, as_json: bool) -> Report:
    """Add inputs and output; hashes are computed only for a report that programs will read."""
    inputs = tuple(_input(a, as_json) for a in adapters)
    written = None if output is None else {"path": str(output), "bytes": _size(output)}
    return report.with_(inputs=inputs, output=written)


def _input(adapter: Adapter, with_hash: bool) -> dict[str, Any]:
    path = adapter.meta.path
    return {
        "path": None if path is None else str(path),
        "format": adapter.meta.format,
        "sha256": _sha256(path) if with_hash and path is not None else None,
    }


def _sha256(path: Path) -> str:
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(f.stat().st_size for f in files if f.is_file())
