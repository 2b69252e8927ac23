"""``loratools routing``."""

from __future__ import annotations

from pathlib import Path

import click

from loratools.cli import _options, _show

COLUMNS: tuple[_show.Column, ...] = (
    ("name", "router", str),
    ("tokens", "tokens", str),
    ("experts", "experts", str),
    ("effective_experts", "effective", _show.small),
    ("at_most_two", "at most 2", _show.percent),
    ("entropy", "entropy", _show.small),
    ("load_effective", "load eff.", _show.small),
    ("dominant", "dominant", _show.percent),
)


@click.command("routing", short_help="How many experts a router really uses.")
@_options.IN
@click.option("--logits", is_flag=True, help="The file holds logits: rows go through a softmax.")
@click.option("--top-k", type=int, metavar="K", help="The router keeps K experts per token.")
@click.option("--fail-on", metavar="EXPR", help="Exit 1 where true, e.g. 'effective_experts<2'.")
@_options.reporting
def command(*, path: Path, logits: bool, top_k: int | None, fail_on: str | None, reporting: _options.Reporting) -> int:
    """Tell from a file of router weights, tensors (tokens, experts), how many experts each router really uses.

    The effective number of a token is (sum w)^2 / sum w^2: 1 for one expert, n for n equal ones.
    """
    from loratools import gates
    from loratools.errors import LoratoolsError
    from loratools.ops.routing import routing

    gate = gates.parse(fail_on)
    try:
        found = routing(path, logits=logits, top_k=top_k)
    except LoratoolsError as error:
        raise error.at(file=path) from error
    report = gates.check(tuple(gate), found)
    report = report.with_(inputs=({"path": str(path), "format": "routing", "sha256": None},))
    _show.show(report, reporting, columns=COLUMNS, worst="at_most_two")
    return int(not all(check["ok"] for check in report.checks))
