"""``loratools squeeze``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loratools.cli import _options, _show

COLUMNS: tuple[_show.Column, ...] = (
    ("name", "module", str),
    ("rank_before", "rank", str),
    ("rank_after", "->", str),
    ("energy", "energy", _show.percent),
    ("relative_error", "rel. error", _show.small),
    ("bytes_before", "bytes", _show.size),
    ("bytes_after", "->", _show.size),
)
WEIGHTED: _show.Column = ("weighted_error", "weighted", _show.small)


def columns(stats: str | None) -> tuple[_show.Column, ...]:
    """Return the columns of the table: with statistics also the error that they weigh."""
    return COLUMNS if stats is None else (*COLUMNS[:5], WEIGHTED, *COLUMNS[5:])


@click.command("squeeze", short_help="The best smaller adapter, exactly.")
@_options.IN
@click.option(
    "--rank", metavar="N|noise", help="Rank of every module (capped by its own), or what beats --base's rounding."
)
@click.option("--energy", type=float, help="Smallest rank that keeps this share of the squared norm, e.g. 0.95.")
@click.option("--error", type=float, help="Smallest rank with at most this relative error, e.g. 0.05.")
@click.option("--size", metavar="BYTES", help="Most accurate file of at most 500000, 20MB (10^6) or 20MiB (2^20).")
@click.option("--max-rank", type=int, help="Never more than this, whatever the target.")
@click.option("--rank-multiple", type=int, default=1, help="Round ranks up to a multiple of this.")
@click.option("--uniform", is_flag=True, help="Give every module the largest rank chosen (padding with zeros).")
@click.option(
    "--for", "consumer", metavar="CONSUMER", help="As --uniform, at the next rank the consumer accepts: vllm."
)
@click.option("--nested", is_flag=True, help="Order channels so that every leading part is the optimum of its rank.")
@_options.STATS
@click.option(
    "--method", type=click.Choice(["exact", "rsvd"]), help="Default: factors exactly, operators of full rank by rsvd."
)
@click.option("--keep-alpha", is_flag=True, help="Keep the input's scale instead of folding it into the factors.")
@click.option("--allow-nonfinite", is_flag=True, help="Carry modules with NaN or inf through untouched.")
@_options.reading
@_options.writing
@_options.running
@_options.reporting
def command(
    *,
    path: Path,
    rank: str | None,
    energy: float | None,
    error: float | None,
    size: str | None,
    max_rank: int | None,
    rank_multiple: int,
    uniform: bool,
    consumer: str | None,
    nested: bool,
    stats: str | None,
    method: str | None,
    keep_alpha: bool,
    allow_nonfinite: bool,
    reading: _options.Reading,
    writing: _options.Writing,
    running: _options.Running,
    reporting: _options.Reporting,
) -> int:
    """Write the adapter of lower rank that is nearest to IN.

    Exactly one of --rank, --energy, --error, --size says how small (--nested alone keeps every rank). Every module gets
    its optimal truncation (Eckart-Young), in the norm of --stats if given; the report gives rank, kept energy, relative
    error and bytes per module.
    """
    from loratools import gates
    from loratools.cli import _session
    from loratools.cli._names import default_output
    from loratools.ops.ranks import Target
    from loratools.ops.squeeze import check_method, squeeze

    gate = gates.parse(writing.fail_on)
    words: dict[str, Any] = {
        "rank": rank,
        "energy": energy,
        "error": error,
        "size": size,
        "max_rank": max_rank,
        "rank_multiple": rank_multiple,
        "uniform": uniform,
        "consumer": consumer,
        "nested": nested,
    }
    target = Target.of(**words)  # contradictions are refused before anything is opened
    check_method(method, target, weighted=stats is not None)
    adapter, opened = _session.read(path, reading, running.device)
    to = _session.Target(writing.output or default_output(path, adapter, target.suffix), writing, reporting)
    to.check([adapter])
    with _session.working(running, reporting, total_bytes=adapter.nbytes):
        done = squeeze(
            adapter,
            **words,
            dtype=writing.dtype,
            base=opened,
            keep_alpha=keep_alpha,
            allow_nonfinite=allow_nonfinite,
            stats=stats,
            method=method,
            seed=running.seed,
        )
    return _session.deliver(done, [adapter], to, gate, columns=columns(stats), worst="relative_error", base=opened)
