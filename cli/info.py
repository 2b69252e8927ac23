"""``loratools info``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from loratools.cli import _options, _show

COLUMNS: tuple[_show.Column, ...] = (
    ("name", "parameter", str),
    ("kind", "kind", str),
    ("shape", "shape", lambda shape: " x ".join(map(str, shape))),
    ("rank", "rank", str),
    ("scale", "scale", _show.small),
    ("dtype", "dtype", str),
    ("bytes", "bytes", _show.size),
)


KERNEL_COLUMNS: tuple[_show.Column, ...] = (
    ("name", "function", str),
    ("runs", "runs", str),
    ("kernel", "kernel", lambda name: name.removeprefix("loratools.kernels.")),
    ("takes", "takes", str),
    ("why", "why", str),
)


@click.command("info", short_help="What a file is, and what is odd about it.")
@click.argument("path", metavar="IN", type=click.Path(path_type=Path), required=False)
@click.option("--kernels", is_flag=True, help="List the GPU kernels that would run here, and why; IN is left out.")
@_options.reading
@_options.running
@_options.reporting
def command(
    *,
    path: Path | None,
    kernels: bool,
    reading: _options.Reading,
    running: _options.Running,
    reporting: _options.Reporting,
) -> int:
    """Print format, kinds, modules, ranks, scales, dtypes, sizes, base id, and what is odd about the file.

    Unknown tensors are listed here rather than refused.
    """
    if (path is None) != kernels:
        raise click.UsageError("give either IN or --kernels")
    if path is None:
        return _kernels(reporting)
    from loratools.cli import _session
    from loratools.ops.info import info

    adapter, _ = _session.read(path, reading._replace(allow_unknown=True))  # unknown keys are told, not refused
    with _session.working(running, reporting, total_bytes=adapter.nbytes):
        found = info(adapter)
    report = _session.described(found, [adapter], None, as_json=reporting.as_json)
    if not reporting.silent:
        _show.summary(_facts(report.total))
    _show.show(report, reporting, columns=COLUMNS, worst="bytes")
    return 0


def _kernels(how: _options.Reporting) -> int:
    from loratools.ops.kernels import kernels

    report = kernels()
    if not how.silent:
        _show.summary({"mode": report.total["mode"], "device": report.total["device"] or "no GPU"})
    _show.show(report, how, columns=KERNEL_COLUMNS)
    return 0


def _facts(total: Mapping[str, Any]) -> dict[str, Any]:
    counted = {k: ", ".join(f"{v} x{n}" for v, n in t.items()) for k, t in total.items() if isinstance(t, dict)}
    facts = {**total, **counted, "bytes": _show.size(total["bytes"]), "base": total["base"] or "not named"}
    return {name: value for name, value in facts.items() if value not in ("", 0)}
