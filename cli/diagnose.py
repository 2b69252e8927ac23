"""``loratools diagnose``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loratools.cli import _options, _show

if TYPE_CHECKING:
    from loratools.core.adapter import Adapter
    from loratools.io.base import Base

COLUMNS: tuple[_show.Column, ...] = (
    ("name", "module", str),
    ("rank", "rank", str),
    ("frobenius_norm", "norm", _show.small),
    ("stable_rank", "stable", _show.small),
    ("effective_rank", "effective", _show.small),
    ("share", "share", _show.percent),
    ("relative_norm", "of base", _show.percent),
    ("intruders", "intruders", str),
    ("intruder_index", "at", lambda where: ",".join(map(str, where)) or "-"),
    ("certain", "proven", lambda proven: "yes" if proven else "NO"),
    ("nonfinite", "not finite", str),
)
MOST_RANKS = 16
"""More lines of a rank curve than that are thinned out."""


@click.command("diagnose", short_help="Spectra, health, intruder dimensions; pictures and gates.")
@click.argument("paths", metavar="IN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--top", "k", type=int, default=10, show_default=True, help="Leading singular vectors that are judged.")
@click.option("--eps", type=float, default=0.5, show_default=True, help="Largest cosine of an intruder, exclusive.")
@click.option("--both-sides", is_flag=True, help="Judge right singular vectors, too.")
@click.option("--rank-curve", is_flag=True, help="Errors of the leading channels at every rank (nested adapters).")
@click.option("--whole-model", is_flag=True, help="IN is a fully fine-tuned model, not an adapter; needs --base.")
@click.option("--skip-missing", is_flag=True, help="Leave out what the base lacks, and list it.")
@click.option("--cache", metavar="DIR", type=click.Path(path_type=Path), help="Keep what the base contributes here.")
@click.option("--html", metavar="FILE", type=click.Path(path_type=Path), help="Write one self-contained page.")
@click.option("--plots", metavar="DIR", type=click.Path(path_type=Path), help="Write PNG pictures (extra: plot).")
@click.option("--sarif", metavar="FILE", type=click.Path(path_type=Path), help="Write failed gates as SARIF.")
@click.option("--overwrite", is_flag=True, help="Replace an existing page, pictures or SARIF file.")
@click.option("--fail-on", metavar="EXPR", help="Exit 1 where true, e.g. 'intruders>3, nonfinite>0'.")
@_options.reading
@_options.running
@_options.reporting
def command(
    *,
    paths: tuple[Path, ...],
    k: int,
    eps: float,
    both_sides: bool,
    rank_curve: bool,
    whole_model: bool,
    skip_missing: bool,
    cache: Path | None,
    html: Path | None,
    plots: Path | None,
    sarif: Path | None,
    overwrite: bool,
    fail_on: str | None,
    reading: _options.Reading,
    running: _options.Running,
    reporting: _options.Reporting,
) -> int:
    """Say what an adapter is made of and, with --base, what it does to its base.

    Without a base: spectra, ranks, scale, health of the factors. With one: relative size, overlap with the base's
    leading subspaces, intruder dimensions (leading singular vectors unlike any of the base's) with proof, and bounds on
    attention logits. Several IN are checkpoints of one training, in order.
    """
    from loratools import gates
    from loratools.cli import _pictures, _session
    from loratools.errors import UsageError
    from loratools.ops.diagnose import check_request, diagnose
    from loratools.ops.tally_diagnose import UNITS

    if whole_model and reading.base in (None, "auto"):
        raise UsageError("--whole-model needs the model it came from", hint="pass --base PATH")
    gate = gates.parse(fail_on, tuple(UNITS))
    check_request(k=k, eps=eps, figures=[g.name for g in gate], with_base=reading.base is not None)
    outputs = _pictures.Outputs(html, plots, sarif)
    outputs.check(overwrite=overwrite)
    adapters, opened = _inputs(paths, whole_model, reading, running.device)
    with _session.working(running, reporting, total_bytes=_weight(adapters, opened)):
        report = diagnose(
            adapters,
            base=opened,
            k=k,
            eps=eps,
            both_sides=both_sides,
            rank_curve=rank_curve,
            cache=cache,
            skip_missing=skip_missing,
            seed=running.seed,
        )
    report = gates.check(gate, _session.described(report, adapters, None, as_json=reporting.as_json))
    outputs.write(report, gate, title=_title(paths))
    if not reporting.silent:
        for sentence in report.extra["summary"]:
            click.echo(sentence)
        click.echo()
    _show.show(report, reporting, columns=_filled(report.modules), worst="share")
    if "rank_curve" in report.extra and not reporting.silent:
        _print_curve(report.extra["rank_curve"])
    _pictures.annotate(report, gate)
    return int(not all(check["ok"] for check in report.checks))


def _inputs(
    paths: Sequence[Path], whole_model: bool, reading: _options.Reading, device: str
) -> tuple[list[Adapter], Base | None]:
    from loratools.cli import _session
    from loratools.io.base import Base
    from loratools.ops.whole_model import whole_model as as_adapter

    if whole_model:
        assert reading.base is not None  # checked before
        return [as_adapter(Base.open(path)) for path in paths], Base.open(reading.base)
    opened = None
    adapters = []
    for path in paths:
        adapter, opened = _session.read(path, reading, device)
        adapters.append(adapter)
    return adapters, opened


def _weight(adapters: Sequence[Adapter], base: Base | None) -> int:
    """Return roughly the bytes to go through, which decide whether a progress bar is due."""
    size = 0 if base is None else sum(4 * u.shape[0] * u.shape[-1] for u in adapters[-1].values() if u.shape)
    return size + sum(adapter.nbytes for adapter in adapters)


def _title(paths: Sequence[Path]) -> str:
    """Return a name for the page: that of the last input."""
    last = paths[-1].resolve()
    return last.name if last.is_dir() or last.stem not in ("adapter_model", "model") else last.parent.name


def _print_curve(curve: Mapping[str, Any]) -> None:
    """Print both errors of the whole adapter: every rank, or where these are many the powers of two and the last."""
    ranks = [
        r for r in curve["ranks"] if len(curve["ranks"]) <= MOST_RANKS or r & (r - 1) == 0 or r == curve["ranks"][-1]
    ]
    headings = ["rank", "leading channels", "best choice"]
    errors = (curve["prefix_error"], curve["optimal_error"])
    lines = [[str(r), *(_show.small(error[r - 1]) for error in errors)] for r in ranks]
    click.echo("\nrelative error of the whole adapter at every rank")
    for name, what in (("aurac", "over the ranks"), ("aurac_log2", "over their logarithm")):
        lines.append([f"AURAC {what}", *(_show.small(curve[f"{name}{of}"]) for of in ("", "_optimal"))])
    _show.table(headings, lines[:-1], lines[-1])


def _filled(rows: Sequence[Mapping[str, Any]]) -> tuple[_show.Column, ...]:
    """Return the columns that some row fills."""
    return tuple(column for column in COLUMNS if any(row.get(column[0]) is not None for row in rows))
