"""``loratools resize``."""

from __future__ import annotations

from pathlib import Path

import click

from loratools.cli import _options
from loratools.cli.squeeze import columns


@click.command("resize", short_help="Exactly one rank everywhere, up or down.")
@_options.IN
@click.option("--rank", type=int, required=True, help="Rank of every module.")
@_options.STATS
@click.option("--allow-nonfinite", is_flag=True, help="Carry modules with NaN or inf through untouched.")
@_options.reading
@_options.writing
@_options.running
@_options.reporting
def command(
    *,
    path: Path,
    rank: int,
    stats: str | None,
    allow_nonfinite: bool,
    reading: _options.Reading,
    writing: _options.Writing,
    running: _options.Running,
    reporting: _options.Reporting,
) -> int:
    """Write IN with exactly the given rank in every module.

    Down: the optimal truncation. Up: zero padding that leaves the function unchanged and lets the new channels train.
    Scales are kept, so that training can go on.
    """
    from loratools import gates
    from loratools.cli import _session
    from loratools.cli._names import default_output
    from loratools.ops.ranks import Target
    from loratools.ops.resize import resize

    gate = gates.parse(writing.fail_on)
    suffix = Target(rank=rank).suffix
    adapter, opened = _session.read(path, reading, running.device)
    to = _session.Target(writing.output or default_output(path, adapter, suffix), writing, reporting)
    to.check([adapter])
    with _session.working(running, reporting, total_bytes=adapter.nbytes):
        done = resize(
            adapter, rank=rank, dtype=writing.dtype, base=opened, allow_nonfinite=allow_nonfinite, stats=stats
        )
    return _session.deliver(done, [adapter], to, gate, columns=columns(stats), worst="relative_error", base=opened)
