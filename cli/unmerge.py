"""``loratools unmerge``."""

from __future__ import annotations

from pathlib import Path

import click

from loratools.cli import _options, _show

COLUMNS: tuple[_show.Column, ...] = (
    ("name", "parameter", str),
    ("kind", "kind", str),
    ("update_norm", "update", _show.small),
    ("relative_norm", "of merged", _show.small),
    ("roundtrip_error", "|merge(unmerge(x)) - x|", _show.small),
    ("relative_roundtrip_error", "relative", _show.small),
)


@click.command("unmerge", short_help="Take adapters out of a merged model, up to rounding.")
@click.argument("base_path", metavar="MERGED", type=click.Path(path_type=Path))
@click.argument("paths", metavar="IN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--weights", metavar="W,W...", help="The weights of the merge (default: the undo file's, or 1 each).")
@click.option("--undo", type=click.Path(path_type=Path), help="The file that `merge --undo` wrote.")
@click.option("--resume", is_flag=True, help="Continue a killed job at the first unfinished shard.")
@click.option("--altered-base", is_flag=True, help="The merge was into an altered base (PiSSA, ...).")
@click.option("--allow-unknown", is_flag=True, help="Read adapters with tensors that no rule explains.")
@_options.packing
@click.option("--format", "format", metavar="NAME", help="Read IN as this format instead of detecting it.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to write (default: MERGED-unmerged).")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option("--dry-run", is_flag=True, help="Check names, shapes and what can be taken back; write nothing.")
@click.option(
    "--fail-on", metavar="EXPR", help="Exit 1 and write nothing where true, e.g. 'relative_roundtrip_error>1e-3'."
)
@_options.running
@_options.reporting
def command(
    *,
    base_path: Path,
    paths: tuple[Path, ...],
    weights: str | None,
    undo: Path | None,
    resume: bool,
    altered_base: bool,
    allow_unknown: bool,
    format: str | None,
    output: Path | None,
    overwrite: bool,
    dry_run: bool,
    fail_on: str | None,
    running: _options.Running,
    reporting: _options.Reporting,
) -> int:
    """Write MERGED without what every IN added to it.

    Additive updates are subtracted. DoRA and parameters stored whole need the file that `merge --undo FILE` wrote, and
    are refused by name without it. The bits that the merge rounded away are lost: the report tells, per parameter, how
    far merging again would miss MERGED.
    """
    from loratools import gates
    from loratools.cli import _model, _session
    from loratools.ops.unmerge import unmerge

    gate = gates.parse(fail_on)
    _model.cpu_only(running.device, "unmerge")
    base, adapters = _model.read(base_path, paths, format=format, allow_unknown=allow_unknown)
    target = output or _model.default_output(base_path, "unmerged")
    with _session.working(running, reporting, total_bytes=_model.nbytes(base)):
        report = unmerge(
            base,
            adapters,
            target,
            weights=_model.weights(weights, len(paths)),
            undo_file=undo,
            resume=resume,
            overwrite=overwrite,
            altered_base=altered_base,
            dry_run=dry_run,
            accept=_model.accepts(gate),
        )
    return _model.deliver(report, base, adapters, gate, _model.Shown(target, dry_run, reporting), COLUMNS,
                          worst="relative_roundtrip_error")  # fmt: skip
