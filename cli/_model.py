"""What commands on whole models share: a base and its adapters read, the report shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from loratools import gates
from loratools.cli import _options, _session, _show
from loratools.core.adapter import Adapter
from loratools.errors import UsageError
from loratools.files import load
from loratools.io.base import Base
from loratools.io.quantised import method_of, refuse_gguf, refuse_quantised
from loratools.io.read import open_bundle
from loratools.report import Report


@dataclass(frozen=True)
class Shown:
    """Where the result is, and how the report is told."""

    path: Path
    dry_run: bool
    reporting: _options.Reporting


def read(
    base: Path,
    paths: Sequence[Path],
    *,
    format: str | None,
    allow_unknown: bool,
    allow_fp8: bool = False,
    device: str = "cpu",
) -> tuple[Base, tuple[Adapter, ...]]:
    """Open a model and load adapters for it, which settles their names and orientations; these go to the device.

    A quantised model is refused first: its packed shapes would only look like those of another model.
    """
    place = _session.place(device)
    model = open_model(base)
    if method_of(model) is not None:
        named = (open_bundle(path).config or {} for path in paths)
        model_id = next((str(said) for c in named if (said := c.get("base_model_name_or_path"))), None)
        refuse_quantised(model, model_id=model_id, allow_fp8=allow_fp8)
    order = _options.expert_order()
    return model, tuple(
        place(load(path, format=format, base=model, allow_unknown=allow_unknown, expert_order=order)) for path in paths
    )


def open_model(path: Path) -> Base:
    """Open a model; a GGUF file is refused with what to do."""
    refuse_gguf(path)
    return Base.open(path)


def nbytes(base: Base) -> int:
    """Return the bytes of all tensors of a model."""
    return sum(base.leaf(name).nbytes for name in base)


def weights(text: str | None, count: int) -> tuple[float, ...] | None:
    """Return the numbers of ``--weights 0.5,1``; UsageError unless there is one per input."""
    if text is None:
        return None
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError("--weights does not parse", expected="numbers, comma separated", got=text) from None
    if len(found) != count:
        raise UsageError("--weights needs one number per IN", expected=count, got=text)
    return found


def cpu_only(device: str, verb: str) -> None:
    """Raise UsageError for an explicit GPU: the work is bound by the disk."""
    if device == "cuda":
        raise UsageError(f"{verb} runs on the CPU: it is as fast as the disk there", hint="leave --device out")


def default_output(path: Path, suffix: str) -> Path:
    """Return the output beside the model: ``NAME/`` -> ``NAME-merged/``, and likewise for a single file."""
    source = path.resolve()
    if source.is_dir() or source.suffix != ".safetensors":
        return source.with_name(f"{source.name}-{suffix}")
    return source.with_name(f"{source.stem}-{suffix}.safetensors")


def accepts(gate: Sequence[gates.Gate]) -> Callable[[Report], bool] | None:
    """Return whether a report passes the gates, for jobs that publish their output themselves; None without gates."""
    if not gate:
        return None
    return lambda report: all(check["ok"] for check in gates.check(tuple(gate), report).checks)


def deliver(
    report: Report,
    base: Base,
    adapters: Sequence[Adapter],
    gate: Sequence[gates.Gate],
    shown: Shown,
    columns: Sequence[_show.Column],
    *,
    worst: str,
) -> int:
    """Judge and show the report of a model that is written already; return the exit code."""
    judged = gates.check(tuple(gate), report) if gate and not shown.dry_run else report
    failed = not all(check["ok"] for check in judged.checks)
    written = None if shown.dry_run or failed else shown.path
    full = _session.described(judged, adapters, written, as_json=shown.reporting.as_json)
    full = full.with_(inputs=(*full.inputs, model_input(base)))
    _show.show(full, shown.reporting, columns=columns, worst=worst)
    if not shown.reporting.silent:
        click.echo("nothing written" if written is None else f"wrote {written}")
    return int(failed)


def model_input(base: Base) -> dict[str, Any]:
    """Return the report's row of a model: its identity is the hash of names, shapes and dtypes, not of gigabytes."""
    return {"path": None if base.path is None else str(base.path), "format": "model", "identity": base.identity}
