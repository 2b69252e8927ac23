"""``loratools fuse``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loratools.cli import _options, _show

if TYPE_CHECKING:
    from loratools.report import Report

MOST_TOLD = 8

COLUMNS: tuple[_show.Column, ...] = (
    ("name", "module", str),
    ("inputs", "inputs", str),
    ("rank_before", "rank", str),
    ("rank_after", "->", str),
    ("norm_before", "norm", _show.small),
    ("norm_after", "->", _show.small),
    ("least_kept", "least kept", lambda share: f"{100 * share:.1f}%"),
    ("interference", "interference", _show.small),
    ("from_sum", "from sum", _show.small),
    ("relative_error", "cut", _show.small),
)
ENTRIES: tuple[_show.Column, ...] = (("entries_before", "entries", str), ("entries_after", "->", str))


@click.command("fuse", short_help="Several adapters into one.")
@click.argument("paths", metavar="IN...", nargs=-1, type=click.Path(path_type=Path))
@click.option("--method", default="linear", show_default=True, help="How to fuse; --list explains all methods.")
@click.option("--list", "list_methods", is_flag=True, help="Print the methods: parameters, references, guarantees.")
@click.option("--weights", metavar="W,W...", help="One weight per IN (default 1 each); never normalised in silence.")
@click.option("--set", "settings", metavar="NAME=VALUE", multiple=True, help="A parameter of the method; repeatable.")
@click.option("--rank", metavar="N|full", help="Recompress to this rank; full: keep what has no low rank whole.")
@click.option("--energy", type=float, help="Recompress to the smallest rank that keeps this share of squared norm.")
@click.option(
    "--stats", metavar="FILE", multiple=True, type=click.Path(path_type=Path),
    help="What the inputs of each IN saw, for regmean; once per IN, in order.",
)  # fmt: skip
@click.option("--take", metavar="NAME", help="The IN whose heads and embeddings are taken where they are not equal.")
@click.option("--same-base", is_flag=True, help="Trust that differing base ids mean one model (shapes are checked).")
@click.option("--to", "to", metavar="FORMAT", help="Format to write (default: that of the first IN).")
@_options.reading
@_options.writing
@_options.running
@_options.reporting
@click.pass_context
def command(
    context: click.Context,
    *,
    paths: tuple[Path, ...],
    method: str,
    list_methods: bool,
    weights: str | None,
    settings: tuple[str, ...],
    rank: str | None,
    energy: float | None,
    stats: tuple[Path, ...],
    take: str | None,
    same_base: bool,
    to: str | None,
    reading: _options.Reading,
    writing: _options.Writing,
    running: _options.Running,
    reporting: _options.Reporting,
) -> int:
    """Fuse adapters of one base into one, on their true updates.

    Formats, ranks, scales (rsLoRA), dtypes and target modules may differ; a module that an IN lacks counts as zero.
    DoRA needs --base. Sparse adapters (SHiRA) stay sparse with linear and union. The report says what of every input is
    kept, how much they interfere, and what a cut cost; `loratools compare` tells beforehand what fits together.
    """
    from loratools import gates
    from loratools.cli import _model, _session, _several
    from loratools.cli._names import default_output, written_as
    from loratools.fusion.base import FUSIONS
    from loratools.ops.fuse import fuse
    from loratools.ops.fuse_tally import UNITS

    if list_methods:
        return _list(as_json=reporting.as_json)
    _several.require(context, paths)
    gate = gates.parse(writing.fail_on, tuple(UNITS))
    given = _several.settings(settings)
    FUSIONS[method].settings(given)  # a wrong method or parameter is refused before anything is opened
    weighted = _model.weights(weights, len(paths))
    adapters, opened = _several.read(paths, reading, running.device)
    suffix = "fused" if method == "linear" else f"fused-{method}"
    target = _session.Target(writing.output or default_output(paths[0], adapters[0], suffix), writing, reporting)
    target.check([written_as(a, to or adapters[0].meta.format) for a in adapters])
    with _session.working(running, reporting, total_bytes=sum(a.nbytes for a in adapters)):
        done = fuse(
            adapters,
            method=method,
            weights=weighted,
            rank=_rank(rank),
            energy=energy,
            dtype=writing.dtype,
            base=opened,
            stats=stats or None,
            take=take,
            same_base=same_base,
            seed=running.seed,
            **given,
        )
    assert done.report is not None
    more = _told(done.report)
    columns = (*COLUMNS[:4], *ENTRIES, *COLUMNS[4:]) if "entries_after" in done.report.total else COLUMNS
    return _session.deliver(
        done, adapters, target, gate, columns=columns, worst="relative_error", more=more, base=opened, format=to
    )


def _rank(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.isdecimal() else text


def _told(report: Report) -> list[str]:
    """Return what became of every input, and which pairs disturb each other most."""
    total, names, pairs = report.total, report.extra["names"], report.extra["pairs"]
    if not report.modules:
        return []
    figures = zip(names, total["weights"], total["norms"], total["kept"], total["covered"], strict=True)
    inputs = [
        f"{name}: weight {weight:g}, norm {norm:.3g}, "
        + ("zero" if kept is None else f"kept {100 * kept:.1f}%, {100 * covered:.1f}% of it in the fused subspaces")
        for name, weight, norm, kept, covered in figures
    ]
    known = sorted((p for p in pairs if p["cosine"] is not None), key=lambda p: -p["interference"])
    crossed = [f"{p['a']} and {p['b']}: cosine {p['cosine']:z.2f}, interference {p['interference']:.2f}" for p in known]
    return [*_first(inputs, "inputs"), *_first(crossed, "pairs")]


def _first(lines: list[str], what: str) -> list[str]:
    rest = len(lines) - MOST_TOLD
    return [*lines[:MOST_TOLD], *([f"and {rest} more {what}; --json lists all"] if rest > 0 else [])]


def _list(*, as_json: bool) -> int:
    """Print every method, or one JSON object of them all."""
    import json

    from loratools.fusion.base import FUSIONS

    methods = [_described(name) for name in FUSIONS]
    if as_json:
        click.echo(json.dumps({"schema": "loratools.fuse.methods/1", "methods": methods}))
        return 0
    for said in methods:
        click.echo(f"{click.style(said['name'], bold=True)}: {said['summary']}")
        click.echo(f"    guarantee  {said['guarantee']}")
        click.echo(f"    reference  {said['reference']}")
        for p in said["parameters"]:
            default = "none" if p["default"] is None else str(p["default"]).lower()
            click.echo(f"    --set {p['name']}={default}  ({p['allowed']})")
    return 0


def _described(name: str) -> Mapping[str, Any]:
    from loratools.fusion.base import FUSIONS

    method = FUSIONS[name]
    return {
        "name": name,
        "summary": method.summary,
        "guarantee": method.guarantee,
        "reference": method.reference,
        "one_adapter_is_itself": method.identity is not None,
        "gauge_free": method.gauge_free,
        "order_matters": method.ordered,
        "most": method.most,
        "statistics": "statistics" in method.handed_over,
        "parameters": [
            {"name": p.name, "default": p.default, "allowed": p.allowed} for p in method.parameters.values()
        ],
    }
