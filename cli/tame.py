"""``loratools tame``."""

from __future__ import annotations

from pathlib import Path

import click

from loratools.cli import _options, _show

COLUMNS: tuple[_show.Column, ...] = (
    ("name", "module", str),
    ("intruders", "intruders", str),
    ("tamed", "tamed", str),
    ("rank_before", "rank", str),
    ("rank_after", "->", str),
    ("relative_change", "change", _show.small),
    ("truncation_error", "cut", _show.small),
    ("certain", "proven", lambda proven: "yes" if proven else "NO"),
)


@click.command("tame", short_help="Scale intruder dimensions down, exactly.")
@_options.IN
@click.option("--lambda", "lam", type=float, default=0.75, show_default=True, help="Factor; 1: no change, 0: removed.")
@click.option("--first-only/--all", default=True, show_default=True, help="The first intruder of a matrix, or all.")
@click.option("--keep-rank", is_flag=True, help="Cut back to the old rank; the report tells the loss.")
@click.option("--top", "k", type=int, default=10, show_default=True, help="Leading singular vectors that are judged.")
@click.option("--eps", type=float, default=0.5, show_default=True, help="Largest cosine of an intruder, exclusive.")
@click.option("--skip-missing", is_flag=True, help="Leave what the base lacks as it is, and list it.")
@_options.reading
@_options.writing
@_options.running
@_options.reporting
def command(
    *,
    path: Path,
    lam: float,
    first_only: bool,
    keep_rank: bool,
    k: int,
    eps: float,
    skip_missing: bool,
    reading: _options.Reading,
    writing: _options.Writing,
    running: _options.Running,
    reporting: _options.Reporting,
) -> int:
    """Write IN with its intruder dimensions scaled down.

    Those are leading singular vectors of base + update that are unlike any of the base. Only their singular values
    change. The rank of a matrix grows by one per intruder scaled, unless --keep-rank.
    """
    from loratools import gates
    from loratools.cli import _session
    from loratools.cli._names import default_output
    from loratools.errors import NeedsBaseError
    from loratools.ops.tame import UNITS, check_request, tame

    gate = gates.parse(writing.fail_on, tuple(UNITS))
    check_request(lam=lam, k=k, eps=eps)
    adapter, opened = _session.read(path, reading, running.device)
    if opened is None:
        raise NeedsBaseError("intruders are those of an update in its base", hint="pass --base")
    to = _session.Target(writing.output or default_output(path, adapter, "tamed"), writing, reporting)
    to.check([adapter])
    size = sum(4 * u.shape[0] * u.shape[-1] for u in adapter.values() if u.shape)
    with _session.working(running, reporting, total_bytes=size):
        done = tame(
            adapter,
            base=opened,
            lam=lam,
            every=not first_only,
            keep_rank=keep_rank,
            k=k,
            eps=eps,
            skip_missing=skip_missing,
            seed=running.seed,
        )
    return _session.deliver(
        done, [adapter], to, gate, columns=COLUMNS, worst="relative_change", base=opened, dtype=writing.dtype
    )
