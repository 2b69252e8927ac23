"""``loratools shira``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loratools.cli import _options, _show

COLUMNS: tuple[_show.Column, ...] = (
    ("name", "module", str),
    ("kind", "kind", str),
    ("nnz", "entries", str),
    ("density", "density", _show.percent),
    ("energy", "energy", _show.percent),
    ("relative_error", "rel. error", _show.small),
    ("bytes_before", "bytes", _show.size),
    ("bytes_after", "->", _show.size),
)


@click.command("shira", short_help="A sparse adapter that switches in place (SHiRA).")
@_options.IN
@click.option("--density", type=float, required=True, help="Share of the entries to keep, e.g. 0.01.")
@click.option(
    "--mask",
    default="magnitude",
    show_default=True,
    metavar="NAME",
    help="Which entries: magnitude (largest |D|), weight (|W|), snip (|W D|), random, struct; W needs --base.",
)
@click.option(
    "--scope", default="module", show_default=True, metavar="NAME", help="Count per module, or global (--to native)."
)
@click.option("--plus-lowrank", type=int, metavar="N", help="Best part of rank N, plus the entries of what it leaves.")
@click.option(
    "--to",
    type=click.Choice(["peft", "native"]),
    help="Layout: peft (r (in + out) values per module), or the compact native one, which --scope global and "
    "--plus-lowrank take by themselves.  [default: peft]",
)
@click.option("--keep-base", is_flag=True, help="Store --base's values at the entries, for undoing without the base.")
@_options.reading
@_options.writing
@_options.running
@_options.reporting
def command(
    *,
    path: Path,
    density: float,
    mask: str,
    scope: str,
    plus_lowrank: int | None,
    to: str | None,
    keep_base: bool,
    reading: _options.Reading,
    writing: _options.Writing,
    running: _options.Running,
    reporting: _options.Reporting,
) -> int:
    """Write IN as the few entries of its update that matter most, at their places in the weights.

    Such an adapter has high rank, is applied by writing 1% of the weights, and undone bit for bit (see switch). Entries
    are formed block by block. The report gives the retained energy per module: of a LoRA, 1% of the entries hold
    10-30%, which is another adapter; --plus-lowrank keeps a good one.
    """
    from loratools import gates
    from loratools.cli import _session
    from loratools.cli._names import placed, written_as
    from loratools.ops.sparsify import Sparsity, shira

    gate = gates.parse(writing.fail_on)
    to = to or ("native" if scope == "global" or plus_lowrank is not None or keep_base else "peft")
    Sparsity(density, mask, scope, plus_lowrank, to)  # contradictions are refused before anything is opened
    adapter, opened = _session.read(path, reading, running.device)
    words: dict[str, Any] = {"density": density, "mask": mask, "scope": scope, "plus_lowrank": plus_lowrank}
    target = writing.output or placed(path.absolute(), to, f"shira{density:g}")
    shown = _session.Target(target, writing, reporting)
    shown.check([written_as(adapter, to)])
    with _session.working(running, reporting, total_bytes=adapter.nbytes):
        done = shira(adapter, **words, base=opened, keep_base=keep_base, to=to, dtype=writing.dtype, seed=running.seed)
    code = _session.deliver(done, [adapter], shown, gate, columns=COLUMNS, worst="relative_error", base=opened,
                            format=to)  # fmt: skip
    if not reporting.silent:
        _show.density(done.report)
    return code
