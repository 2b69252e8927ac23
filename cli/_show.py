"""Reports on a terminal: rich tables on stdout, warnings and progress on stderr. Nothing is computed here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import click

from loratools.cli._options import Reporting
from loratools.report import Report

MOST_ROWS = 40
LONG_WORK_BYTES = 256 << 20
Column = tuple[str, str, Callable[[Any], str]]  # figure, heading, how to print it


def show(report: Report, how: Reporting, *, columns: Sequence[Column], worst: str | None = None) -> None:
    """Print a report: one JSON object, or a table of the modules (the worst where there are many) and the total."""
    if how.as_json:
        click.echo(report.to_json())
        return
    for line in report.warnings:
        if not how.quiet:
            click.echo(f"warning: {line}", err=True)
    for failed in (check for check in report.checks if not check["ok"]):
        where = f" in {failed['module']}" if "module" in failed else ""
        click.echo(f"gate failed: {failed['expr']} (value {failed['value']:g}{where})", err=True)
    if not how.quiet:
        _table(report, columns, worst)


def _table(report: Report, columns: Sequence[Column], worst: str | None) -> None:
    rows = _shown(report, worst)
    prefix = _common_prefix([row["name"] for row in rows])
    headings = [
        f"{heading} ({prefix}...)" if figure == "name" and prefix else heading for figure, heading, _ in columns
    ]
    lines = [
        [_cell(row, column).removeprefix(prefix) if column[0] == "name" else _cell(row, column) for column in columns]
        for row in rows
    ]
    total = ["total" if column[0] == "name" else _cell(report.total, column, missing="") for column in columns]
    table(headings, lines, total)
    if len(rows) < len(report.modules):
        click.echo(f"the {len(rows)} of {len(report.modules)} with the largest {worst}; --json lists all")


def table(headings: list[str], lines: list[list[str]], total: list[str]) -> None:
    """Print rows of text with a last line of totals; in colour where a person looks."""
    (_rich_table if sys.stdout.isatty() else _plain_table)(headings, lines, total)


def _shown(report: Report, worst: str | None) -> list[Any]:
    """Return the rows to print: all of them, layers counted as people count, or the worst where there are many."""
    rows = sorted(report.modules, key=lambda row: _natural(row["name"]))
    if len(rows) <= MOST_ROWS or worst is None:
        return rows
    return sorted(rows, key=lambda row: -(row[worst] or 0.0))[:MOST_ROWS]


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _common_prefix(names: list[str]) -> str:
    """Return the dotted prefix that all names share; printing it once leaves room for what differs."""
    split = [name.split(".")[:-1] for name in names] if len(names) > 1 else [[]]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*split, strict=False))
    return "".join(f"{parts[0]}." for parts in shared)


def _cell(row: Mapping[str, Any], column: Column, missing: str = "-") -> str:
    figure, _, text = column
    return text(row[figure]) if row.get(figure) is not None else missing


def _plain_table(headings: list[str], lines: list[list[str]], total: list[str]) -> None:
    """Print aligned columns, as pipes and logs want them."""
    table = [headings, *lines, total]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        name, *cells = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        click.echo("  ".join((name, *cells)).rstrip())


def _rich_table(headings: list[str], lines: list[list[str]], total: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_footer=True, footer_style="bold")
    for i, (heading, footer) in enumerate(zip(headings, total, strict=True)):
        table.add_column(heading, footer, justify="right" if i else "left", overflow="fold")
    for line in lines:
        table.add_row(*line)
    Console(highlight=False).print(table)


def summary(facts: Mapping[str, Any]) -> None:
    """Print a short list of facts, one a line."""
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        click.echo(f"{name:<{width}}  {value}")


def size(count: Any) -> str:
    """Return bytes in decimal units, as file managers do."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return ""


def percent(share: Any) -> str:
    """Return a share as a percentage with two decimals (more where it is nearly all)."""
    return f"{100 * share:.2f}%" if not 0.9999 <= share < 1 else f"{100 * share:.5f}%"


def small(value: Any) -> str:
    """Return a small number in three significant digits."""
    return f"{value:.3g}"


@contextmanager
def progress(total: int, *, enabled: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Yield a callback (done, total) that moves a bar on stderr; None where no bar is due."""
    if not enabled or total < LONG_WORK_BYTES:
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("working", total=total)
        yield lambda done, whole: bar.update(task, completed=done, total=whole)


def density(report: Any) -> None:
    """Print what the table of a sparse adapter has no room for: densities, r, and what each layout would take."""
    total = report.total
    peft = "cannot hold it" if total["bytes_peft"] is None else size(total["bytes_peft"])
    r = "" if total["r"] is None else f", r = {total['r']}"
    click.echo(f"density {total['density_asked']:g} asked, {total['density']:.6g} written{r}")
    click.echo(f"weights file: native {size(total['bytes_native'])}, peft {peft}")
