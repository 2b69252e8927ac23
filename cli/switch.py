"""``loratools switch``."""

from __future__ import annotations

from pathlib import Path

import click

from loratools.cli import _options, _show

COLUMNS: tuple[_show.Column, ...] = (
    ("name", "parameter", str),
    ("entries", "entries", str),
    ("share", "share", _show.percent),
    ("overlap", "overlap", str),
)


@click.command("switch", short_help="Sparse adapters on and off in a checkpoint, in place.")
@click.argument("model_path", metavar="MODEL", type=click.Path(path_type=Path))
@click.option(
    "--on", "on", multiple=True, type=click.Path(path_type=Path), help="Sparse adapter to put on; repeatable."
)
@click.option("--off", "off", multiple=True, type=click.Path(path_type=Path), help="Sparse adapter to take off.")
@click.option("--dry-run", is_flag=True, help="Check everything, write nothing.")
@_options.reporting
def command(
    *, model_path: Path, on: tuple[Path, ...], off: tuple[Path, ...], dry_run: bool, reporting: _options.Reporting
) -> int:
    """Put sparse adapters on in MODEL's safetensors files, in place, and take others off.

    Only the entries of the adapters are written. What they were is kept beside the model, so that --off restores every
    bit; a switch that is killed is completed by the next call (also by one without --on and --off). Another base, or a
    model that was changed meanwhile, is refused before anything is written.
    """
    from loratools.ops.switch import switch

    report = switch(model_path, on=on, off=off, dry_run=dry_run)
    if reporting.as_json:
        report = report.with_(inputs=({"path": str(model_path), "format": "model"},))
    _show.show(report, reporting, columns=COLUMNS, worst="entries")
    if not reporting.silent:
        labels = report.extra["on"]
        if dry_run:
            click.echo("nothing written")
        click.echo(f"on: {', '.join(labels)}" if labels else "on: nothing")
    return 0
