"""``loratools collapse``."""

from __future__ import annotations

from pathlib import Path

import click

from loratools.cli import _options, _show

COLUMNS: tuple[_show.Column, ...] = (
    ("name", "module", str),
    ("experts", "experts", str),
    ("effective_experts", "effective", _show.small),
    ("rank_after", "rank", str),
    ("spread_rms", "spread", _show.percent),
    ("spread_max", "at most", _show.percent),
    ("bytes_after", "bytes", _show.size),
)


@click.command("collapse", short_help="A static adapter of some experts of a routed mixture.")
@_options.IN
@click.option("--experts", metavar="N,N,...", help="These experts, each with weight --omega.")
@click.option("--mean", is_flag=True, help="All experts, alike.")
@click.option(
    "--routing", type=click.Path(path_type=Path), metavar="FILE", help="Mean weights of a file (tokens, experts)."
)
@click.option("--logits", is_flag=True, help="The routing file holds logits.")
@click.option("--top-k", type=int, metavar="K", help="The router keeps K experts per token.")
@click.option("--omega", type=float, metavar="NUMBER", help="Weight of each chosen expert.  [default: 1 / how many]")
@click.option("--scale", type=float, metavar="NUMBER", help="alpha / r, where no config says it.")
@click.option("--to", default="peft", show_default=True, metavar="FORMAT", help="Format to write.")
@_options.writing
@_options.running
@_options.reporting
def command(
    *,
    path: Path,
    experts: str | None,
    mean: bool,
    routing: Path | None,
    logits: bool,
    top_k: int | None,
    omega: float | None,
    scale: float | None,
    to: str,
    writing: _options.Writing,
    running: _options.Running,
    reporting: _options.Reporting,
) -> int:
    """Write the experts of a routed mixture (MixLoRA, ReMix, ...) as one ordinary adapter, for one routing.

    Exact for that routing: the weighted sum of the experts' updates, of the sum of their ranks, or of one rank where
    they share a factor. A routed model chooses anew for every token, so the report says how far other choices of as
    many experts are from this one. IN may be a manifest.
    """
    from loratools import gates
    from loratools.cli import _session
    from loratools.cli._names import placed
    from loratools.errors import LoratoolsError
    from loratools.ops.collapse import collapse

    gate = gates.parse(writing.fail_on)
    target = writing.output or placed(path.absolute(), to, "collapsed")
    shown = _session.Target(target, writing, reporting)
    try:
        with _session.working(running, reporting, total_bytes=0):
            done = collapse(path, experts=_numbers(experts), mean=mean, routing=routing, logits=logits, top_k=top_k,
                            omega=omega, scale=scale)  # fmt: skip
    except LoratoolsError as error:
        raise error.at(file=path) from error
    shown.check([done])
    return _session.deliver(
        done, [done], shown, gate, columns=COLUMNS, worst="spread_rms", format=to, dtype=writing.dtype
    )


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise click.BadParameter("numbers of experts, like 0,3", param_hint="--experts")
    return [int(part) for part in parts]
