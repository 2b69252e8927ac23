"""``loratools check``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loratools.cli import _options, _show

if TYPE_CHECKING:
    from loratools.io.base import Base
    from loratools.report import Report

_WIDTH = 100


class _Command(click.Command):
    """Lists the consumers below the help; their profiles are imported only then."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from loratools.consumers.base import CONSUMERS

        with formatter.section("Consumers"):
            formatter.write_dl([(name, f"{p.title}: {p.version}") for name, p in CONSUMERS.items()])


@click.command("check", cls=_Command, short_help="Would the receiving program load it, and apply it right?")
@click.argument("paths", metavar="IN...", nargs=-1, required=True)
@click.option("--for", "consumers", metavar="CONSUMER", multiple=True, required=True,
              help="Program that receives the adapter, or all; may be given several times.")  # fmt: skip
@click.option("--base", metavar="PATH|auto", help="Base model: judges names and shapes, and maps names with --fix.")
@click.option("--format", "format", metavar="NAME", help="Read IN as this format instead of detecting it.")
@click.option("--max-rank", type=click.IntRange(1), help="Rank limit that the server was started with.")
@click.option("--fix", is_flag=True, help="Write the version that loads right to -o, and check it again.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where --fix writes.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option("--dry-run", is_flag=True, help="With --fix: tell the steps and write nothing.")
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="With --fix: an option of the written format."
)
@click.option("--sarif", type=click.Path(path_type=Path), help="Also write the findings as SARIF 2.1.0.")
@_options.reporting
def command(
    *,
    paths: tuple[str, ...],
    consumers: tuple[str, ...],
    base: str | None,
    format: str | None,
    max_rank: int | None,
    fix: bool,
    output: Path | None,
    overwrite: bool,
    dry_run: bool,
    settings: tuple[str, ...],
    sarif: Path | None,
    reporting: _options.Reporting,
) -> int:
    """Tell what would go wrong with adapters in the programs that are to receive them.

    IN is a file, an adapter directory, a directory of adapters or a pattern. Exit code 0: everything loads right; 1: it
    does not. With --fix, 0 means that the written file passes. In a GitHub Actions run the findings are annotations.
    """
    from loratools.cli._gather import gathered
    from loratools.consumers.base import CONSUMERS
    from loratools.errors import UsageError
    from loratools.io.output import check_output
    from loratools.ops.check import check

    names = list(CONSUMERS) if "all" in consumers else list(dict.fromkeys(consumers))
    files = gathered(paths)
    if fix and (len(files) != 1 or len(names) != 1 or output is None):
        raise UsageError("--fix writes one file for one consumer", expected="one IN, one --for, and -o OUT",
                         got=f"{len(files)} inputs, {len(names)} consumers, -o {output}")  # fmt: skip
    if not fix and (output or dry_run or settings):
        raise UsageError("-o, --dry-run and --set need --fix")
    if sarif is not None:
        check_output(sarif, inputs=files, overwrite=True)
    opened = _base(base, files, format)
    if fix:
        assert output is not None
        report = _fixed(files[0], names[0], output, opened, format, max_rank, overwrite, dry_run, settings)
    else:
        report = check(files, names, base=opened, format=format, max_rank=max_rank)
    return _told(report, sarif, reporting)


def _base(base: str | None, files: Sequence[Path], format: str | None) -> Base | None:
    """Open the base; ``auto`` is the one that the first adapter names."""
    from loratools.cli import _session
    from loratools.io.base import Base

    if base == "auto":
        return _session.read(files[0], _options.Reading(format, "auto", allow_unknown=True))[1]
    return None if base is None else Base.open(base)


def _fixed(
    file: Path, consumer: str, output: Path, base: Base | None, format: str | None, max_rank: int | None,
    overwrite: bool, dry_run: bool, settings: tuple[str, ...],
) -> Report:  # fmt: skip
    """Write the fixed version and return the report of the written file, or of the input where it cannot be mended."""
    from loratools.consumers.base import CONSUMERS
    from loratools.consumers.subject import read
    from loratools.errors import ConversionError, FormatError, MismatchError, NameUnresolvedError, NeedsBaseError
    from loratools.ops.check import check, judged, reported
    from loratools.ops.fix import fix

    subject = read(file, format=format, base=base, limit=max_rank)
    before = judged(subject, consumer)
    told: dict[str, Any] = {"before": [f.id for f in before]}
    options = _settings(CONSUMERS[consumer].recipe.format, settings)
    try:
        done = fix(subject, consumer, output, overwrite=overwrite, dry_run=dry_run, **options)
    except (ConversionError, FormatError, MismatchError, NameUnresolvedError, NeedsBaseError) as error:
        row = {"path": str(subject.bundle.path), "format": subject.format, "sha256": None}
        report = reported([(file, consumer, before)], [row])
        told |= {"mended": False, "problem": str(error)}
        failed = {"expr": "can be mended", "module": str(file), "value": 0, "ok": False}
        return report.with_(extra={**report.extra, "fix": told}, checks=(*report.checks, failed))
    told |= {"mended": True, "steps": list(done.steps), "extras": list(done.extras),
             "aside": None if done.aside is None else str(done.aside)}  # fmt: skip
    if dry_run:
        report = reported([(file, consumer, before)], [{"path": str(subject.bundle.path), "format": subject.format}])
        return report.with_(extra={**report.extra, "fix": told})
    report = check(output, consumer, base=base, max_rank=max_rank)
    return report.with_(extra={**report.extra, "fix": told}, output={"path": str(output)})


def _settings(format: str, words: tuple[str, ...]) -> dict[str, Any]:
    from loratools.cli.convert import parsed_settings

    return parsed_settings(format, words)


def _told(report: Report, sarif: Path | None, how: _options.Reporting) -> int:
    import os

    from loratools.ops.check import items
    from loratools.sarif import workflow_commands

    if sarif is not None:
        _write_sarif(report, sarif)
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for line in workflow_commands(items(report)):
            click.echo(line, err=True)
    if how.as_json:
        click.echo(_hashed(report).to_json())
    elif not how.quiet:
        _print(report)
    return int(not all(check["ok"] for check in report.checks))


def _write_sarif(report: Report, path: Path) -> None:
    import json

    from loratools.io.write import write_text
    from loratools.ops.check import items
    from loratools.sarif import sarif

    write_text(path, json.dumps(sarif(items(report)), indent=1) + "\n", overwrite=True)


def _hashed(report: Report) -> Report:
    import hashlib

    def one(path: Path) -> str | None:
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None

    return report.with_(inputs=tuple({**row, "sha256": one(Path(row["path"]))} for row in report.inputs))


def _print(report: Report) -> None:
    """One table of all files and consumers, then each finding with what mends it."""
    rows = [(m["file"], m["consumer"], m["verdict"], *(str(m[k] or "-") for k in ("errors", "warnings", "notes")))
            for m in report.modules]  # fmt: skip
    headings = ["file", "consumer", "verdict", "errors", "warnings", "notes"]
    total = ["total", "", f"{report.total['passed']} of {len(rows)} load right",
             *(str(report.total[k]) for k in ("errors", "warnings", "notes"))]  # fmt: skip
    _show.table(headings, [list(row) for row in rows], total)
    for row in report.extra["findings"]:
        effect = "" if row["level"] == "note" else f" {row['effect']}"
        click.echo(f"\n{row['level']} {row['id']}: {row['file']}{effect}")
        for label, text in (
            ("seen", row["evidence"]),
            ("why", f"{row['reason']} [{row['source']}]"),
            ("mend", row["mend"]),
        ):
            click.echo(f"  {label}: {text}")
    _print_fix(report.extra.get("fix"), report)


def _print_fix(told: dict[str, Any] | None, report: Report) -> None:
    if told is None:
        return
    if not told["mended"]:
        click.echo(f"\nnothing written: {told['problem']}")
        return
    click.echo("")
    for step in told["steps"]:
        click.echo(f"- {step}")
    click.echo("nothing written" if report.output is None else f"wrote {report.output['path']}")
