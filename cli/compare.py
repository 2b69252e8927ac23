"""``loratools compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from loratools.cli import _options, _show

if TYPE_CHECKING:
    from loratools.report import Report

COLUMNS: tuple[_show.Column, ...] = (
    ("pair", "pair", str),
    ("cosine", "cosine", lambda x: f"{x:z.3f}"),
    ("angle_output", "out angle", lambda x: f"{x:.1f}"),
    ("angle_input", "in angle", lambda x: f"{x:.1f}"),
    ("a_in_b", "a in b", lambda x: f"{100 * x:.1f}%"),
    ("b_in_a", "b in a", lambda x: f"{100 * x:.1f}%"),
    ("sign_conflict", "sign conflict", lambda x: f"{100 * x:.1f}%"),
    ("interference", "interference", lambda x: f"{x:.3f}"),
    ("verdict", "verdict", str),
)
SPARSE: tuple[_show.Column, ...] = (
    ("awom", "AWOM", _show.small),
    ("awor", "AWOR", lambda x: f"{100 * x:.1f}%"),
    ("overlap", "overlap", lambda x: f"{100 * x:.1f}%"),
)


@click.command("compare", short_help="How alike adapters are, and what to fuse.")
@click.argument("paths", metavar="IN...", nargs=-1, required=True)
@click.option("--same-base", is_flag=True, help="Trust that differing base ids mean one model (shapes are checked).")
@click.option(
    "--sample", type=int, default=1 << 18, show_default=True,
    help="Entries per module on which signs are compared, at most 1048576.",
)  # fmt: skip
@click.option("--plots", metavar="DIR", type=click.Path(path_type=Path), help="Write PNG pictures (extra: plot).")
@click.option("--overwrite", is_flag=True, help="Replace existing pictures.")
@click.option("--fail-on", metavar="EXPR", help="Exit 1 where true for a pair, e.g. 'interference>0.5'.")
@_options.reading
@_options.running
@_options.reporting
def command(
    *,
    paths: tuple[str, ...],
    same_base: bool,
    sample: int,
    plots: Path | None,
    overwrite: bool,
    fail_on: str | None,
    reading: _options.Reading,
    running: _options.Running,
    reporting: _options.Reporting,
) -> int:
    """Compare adapters of one base in pairs: updates, subspaces, signs; and say what to fuse and what not.

    IN may be a directory of adapters or a pattern. Nothing is formed, so hundreds of adapters are compared in bounded
    memory. Sparse adapters (SHiRA) also get AWOM, AWOR and overlap. --json has every pair with its figures per group of
    modules, the similarity graph and its communities.
    """
    from loratools import gates
    from loratools.cli import _gather, _pictures, _session, _several
    from loratools.ops.compare import compare
    from loratools.ops.compare_words import UNITS
    from loratools.ops.sparse_interference import UNITS as SPARSE_UNITS

    gate = gates.parse(fail_on, (*UNITS, *SPARSE_UNITS))
    outputs = _pictures.Outputs(None, plots, None)
    outputs.check(overwrite=overwrite)
    files = _gather.gathered(paths)
    adapters, opened = _several.read(files, reading, running.device)
    work = sum(a.nbytes for a in adapters) * len(adapters)
    with _session.working(running, reporting, total_bytes=work):
        report = compare(adapters, base=opened, same_base=same_base, sample=sample, seed=running.seed)
    report = gates.check(gate, _session.described(report, adapters, None, as_json=reporting.as_json))
    if plots is not None:
        from loratools.render.compare_plots import plots as draw

        draw(report, plots)
    columns = (*COLUMNS[:-1], *SPARSE, COLUMNS[-1]) if "awom" in report.total else COLUMNS
    _show.show(report if reporting.as_json else _paired(report), reporting, columns=columns, worst="interference")
    if not reporting.silent:
        if report.modules:
            click.echo(f"signs on {sample} evenly spaced entries per module at most")
        for sentence in report.extra["recommendation"]:
            click.echo(f"\n{sentence}")
    return int(not all(check["ok"] for check in report.checks))


def _paired(report: Report) -> Report:
    """Return the report with its rows named as pairs: names of adapters are no dotted paths with a common prefix."""
    rows = tuple({**row, "pair": row["name"]} for row in report.modules)
    return report.with_(modules=rows, total={**report.total, "pair": "mean"})
