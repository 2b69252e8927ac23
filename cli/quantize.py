"""``loratools quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loratools.cli import _options, _show

COLUMNS: tuple[_show.Column, ...] = (
    ("name", "module", str),
    ("rank_before", "rank", str),
    ("components", "->", str),
    ("bits", "bits", _show.small),
    ("relative_error", "rel. error", _show.small),
    ("bytes_before", "bytes", _show.size),
    ("bytes_after", "->", _show.size),
)
WEIGHTED: _show.Column = ("weighted_error", "weighted", _show.small)
FRONTIER: tuple[_show.Column, ...] = (
    ("name", "spent as", str),
    ("bits", "bits per weight", _show.small),
    ("bytes", "bytes", _show.size),
    ("relative_error", "rel. error", _show.small),
    ("best", "", lambda best: "*" if best else ""),
)


@click.command("quantize", short_help="An adapter in one to eight bits per weight.")
@_options.IN
@click.option("--bits", type=int, help="1, 2, 3, 4 or 8 bits for every component.")
@click.option("--avg-bits", type=float, help="Bits per stored weight, scales counted, shared out where they help most.")
@click.option("--size", metavar="BYTES", help="Most accurate file of at most 500000, 20MB (10^6) or 20MiB (2^20).")
@click.option("--group", type=int, default=0, help="Entries per scale (default: whole vectors, 128 where it helps).")
@click.option(
    "--scheme",
    default="lowbit",
    show_default=True,
    metavar="NAME",
    help="lowbit, or binary-adapter: one mean and deviation per factor, median levels (1, 2, 4, 8 bits).",
)
@click.option("--raw", is_flag=True, help="Write --scheme binary-adapter in the headerless bytes of its own program.")
@click.option("--advise", is_flag=True, help="Print the frontier of error against bytes for this adapter; no output.")
@_options.STATS
@_options.reading
@_options.writing
@_options.running
@_options.reporting
def command(
    *,
    path: Path,
    bits: int | None,
    avg_bits: float | None,
    size: str | None,
    group: int,
    scheme: str,
    raw: bool,
    advise: bool,
    stats: str | None,
    reading: _options.Reading,
    writing: _options.Writing,
    running: _options.Running,
    reporting: _options.Reporting,
) -> int:
    """Write IN in few bits per weight, with the least error that the bytes allow.

    Exactly one of --bits, --avg-bits, --size. The file is of the native format: info, diagnose, merge, fuse and squeeze
    read it as it is, dequantize turns it back into factors that any program loads. The report counts every byte, and
    says what the same bytes would do spent otherwise.
    """
    from loratools import gates
    from loratools.cli import _session
    from loratools.cli._names import placed, written_as
    from loratools.errors import UsageError
    from loratools.ops.quantise import quantize
    from loratools.ops.quantise_budget import Budget

    gate = gates.parse(writing.fail_on)
    if advise:
        idle = {"bits": bits, "avg-bits": avg_bits, "size": size, "raw": raw, "stats": stats, "output": writing.output,
                "overwrite": writing.overwrite, "dry-run": writing.dry_run, "scheme": scheme != "lowbit"}  # fmt: skip
        _alone([name for name, value in idle.items() if value is not None and value is not False])
    if writing.dtype is not None:
        raise UsageError("packed codes have no dtype", got=f"--dtype {writing.dtype}", hint="leave it out")
    if raw and scheme != "binary-adapter":
        raise UsageError("--raw is the layout of one scheme", expected="--scheme binary-adapter", got=scheme)
    words: dict[str, Any] = {"bits": bits, "avg_bits": avg_bits, "size": size, "group": group, "scheme": scheme}
    budget = None if advise else Budget(**words)  # contradictions are refused before anything is opened
    adapter, opened = _session.read(path, reading, running.device)
    if advise:
        return _advised(adapter, group, gate, running, reporting)
    assert budget is not None
    suffix = f"{budget.suffix}.bin" if raw else budget.suffix
    target = writing.output or (placed(path.absolute(), "native", suffix).with_suffix("") if raw else placed(
        path.absolute(), "native", suffix))  # fmt: skip
    shown = _session.Target(target, writing, reporting)
    shown.check([written_as(adapter, "native")])
    with _session.working(running, reporting, total_bytes=adapter.nbytes):
        done = quantize(adapter, **words, stats=stats, base=opened)
    if raw:
        return _raw(done, adapter, shown, gate)
    columns = COLUMNS if stats is None else (*COLUMNS[:5], WEIGHTED, *COLUMNS[5:])
    code = _session.deliver(done, [adapter], shown, gate, columns=columns, worst="relative_error", format="native")
    if not reporting.silent:
        _neighbours(done.report)
    return code


def _alone(given: list[str]) -> None:
    """Refuse options that would be idle beside --advise, which tries all budgets and writes nothing."""
    from loratools.errors import UsageError

    if given:
        raise UsageError("--advise tries every budget and writes nothing", got=f"--{given[0]}", hint="leave it out")


def _advised(adapter: Any, group: int, gate: Any, running: _options.Running, reporting: _options.Reporting) -> int:
    from loratools import gates
    from loratools.cli import _session
    from loratools.ops.advise import advise

    with _session.working(running, reporting, total_bytes=adapter.nbytes):
        report = gates.check(tuple(gate), advise(adapter, group=group))
    report = _session.described(report, [adapter], None, as_json=reporting.as_json)
    _show.show(report, reporting, columns=FRONTIER)
    return int(not all(check["ok"] for check in report.checks))


def _raw(done: Any, adapter: Any, shown: Any, gate: Any) -> int:
    """Write the headerless layout; gates and report as for every other output."""
    from loratools import gates
    from loratools.cli import _session
    from loratools.formats.binary_bytes import to_bytes
    from loratools.io.output import write_bytes

    report = gates.check(tuple(gate), done.report)
    failed = not all(check["ok"] for check in report.checks)
    written = None
    if not (shown.writing.dry_run or failed):
        written = write_bytes(shown.path, to_bytes(done), overwrite=shown.writing.overwrite)
    report = _session.described(report, [adapter], written, as_json=shown.reporting.as_json)
    _show.show(report, shown.reporting, columns=COLUMNS, worst="relative_error")
    if not shown.reporting.silent:
        click.echo("nothing written" if written is None else f"wrote {written}")
    return int(failed)


def _neighbours(report: Any) -> None:
    """Print what the same bytes would do at other numbers of bits."""
    rows = report.extra["neighbours"]
    if rows:
        told = "; ".join(f"{r['bits']} bit x {r['components']:.3g}: {r['relative_error']:.3g}" for r in rows)
        click.echo(
            f"these bytes spent otherwise (bits x components: plain error of a few modules, quickly encoded): {told}"
        )
