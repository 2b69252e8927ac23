"""``loratools slice``."""

from __future__ import annotations

from pathlib import Path

import click

from loratools.cli import _options, _show

COLUMNS: tuple[_show.Column, ...] = (
    ("name", "module", str),
    ("rank_before", "rank", str),
    ("rank_after", "->", str),
    ("scale_before", "scale", _show.small),
    ("scale_after", "->", _show.small),
    ("relative_error", "rel. error", _show.small),
    ("prefix_error", "prefix error", _show.small),
    ("optimal_error", "optimal", _show.small),
    ("bytes_before", "bytes", _show.size),
    ("bytes_after", "->", _show.size),
)


@click.command("slice", short_help="The leading channels of a nested adapter.")
@_options.IN
@click.option("--rank", type=int, required=True, metavar="N", help="How many channels of every module to keep.")
@click.option(
    "--scale-rule",
    type=click.Choice(["keep", "alpha-over-r", "sqrt"]),
    required=True,
    help="Scale of the slice: s, s R/N (alpha stays), or s sqrt(R/N) (alpha stays under rsLoRA).",
)
@click.option("--block-size", type=int, help="DyLoRA of LyCORIS: the scale is alpha over blocks of this many channels.")
@click.option("--to", "to", metavar="FORMAT", help="Format to write (default: that of IN; peft for MatryoshkaLoRA).")
@_options.reading
@_options.writing
@_options.running
@_options.reporting
def command(
    *,
    path: Path,
    rank: int,
    scale_rule: str,
    block_size: int | None,
    to: str | None,
    reading: _options.Reading,
    writing: _options.Writing,
    running: _options.Running,
    reporting: _options.Reporting,
) -> int:
    """Write the leading N channels of a nested adapter (DyLoRA, MatryoshkaLoRA, squeeze --nested).

    The factors keep their bits; the rule says the scale. kohya's splitter and LyCORIS: alpha-over-r (LyCORIS with
    --block-size). MatryoshkaLoRA: its lora_scaling none is keep, rank is alpha-over-r, sqrt is sqrt. squeeze --nested:
    keep. The report tells what the missing channels cost, and what the best update of that rank would lose.
    """
    from loratools import gates
    from loratools.cli import _session
    from loratools.cli._names import placed
    from loratools.ops.slice import UNITS, slice

    gate = gates.parse(writing.fail_on, tuple(UNITS))
    adapter, opened = _session.read(path, reading, running.device)
    to = to or ("peft" if adapter.meta.source == "matryoshka" else adapter.meta.format)
    target = _session.Target(writing.output or placed(path.absolute(), to, f"r{rank}"), writing, reporting)
    target.check([adapter])
    with _session.working(running, reporting, total_bytes=adapter.nbytes):
        done = slice(adapter, rank=rank, scale_rule=scale_rule, block_size=block_size)
    return _session.deliver(
        done,
        [adapter],
        target,
        gate,
        columns=COLUMNS,
        worst="prefix_error",
        base=opened,
        format=to,
        dtype=writing.dtype,
    )
