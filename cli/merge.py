"""``loratools merge``."""

from __future__ import annotations

from pathlib import Path

import click

from loratools.cli import _options, _show

COLUMNS: tuple[_show.Column, ...] = (
    ("name", "parameter", str),
    ("kind", "kind", str),
    ("dtype", "dtype", str),
    ("update_norm", "update", _show.small),
    ("relative_norm", "of base", _show.small),
    ("rounding_loss", "lost by rounding", _show.percent),
)


@click.command("merge", short_help="Fold adapters into their base, shard by shard.")
@click.argument("base_path", metavar="BASE", type=click.Path(path_type=Path))
@click.argument("paths", metavar="IN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--weights", metavar="W,W...", help="One weight per IN (default 1 each).")
@click.option(
    "--rounding", type=click.Choice(["nearest", "stochastic"]), default="nearest", show_default=True,
    help="How results become the base's dtype.",
)  # fmt: skip
@click.option(
    "--undo", type=click.Path(path_type=Path), help="Keep here what `unmerge` needs for DoRA and replacements."
)
@click.option("--resume", is_flag=True, help="Continue a killed job at the first unfinished shard.")
@click.option("--untie", is_flag=True, help="Store input embedding and output head separately where they must differ.")
@click.option("--requantise", is_flag=True, help="fp8 base with scales: dequantise, merge, quantise again.")
@click.option("--altered-base", is_flag=True, help="BASE is the model that IN's initialisation altered (PiSSA, ...).")
@click.option("--no-measure", is_flag=True, help="Leave out norms and rounding losses: somewhat faster.")
@click.option("--allow-unknown", is_flag=True, help="Read adapters with tensors that no rule explains.")
@_options.packing
@click.option("--format", "format", metavar="NAME", help="Read IN as this format instead of detecting it.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to write (default: BASE-merged).")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option("--dry-run", is_flag=True, help="Check names, shapes and dtypes, and write nothing.")
@click.option("--fail-on", metavar="EXPR", help="Exit 1 and write nothing where true, e.g. 'rounding_loss>0.5'.")
@_options.running
@_options.reporting
def command(
    *,
    base_path: Path,
    paths: tuple[Path, ...],
    weights: str | None,
    rounding: str,
    undo: Path | None,
    resume: bool,
    untie: bool,
    requantise: bool,
    altered_base: bool,
    no_measure: bool,
    allow_unknown: bool,
    format: str | None,
    output: Path | None,
    overwrite: bool,
    dry_run: bool,
    fail_on: str | None,
    running: _options.Running,
    reporting: _options.Reporting,
) -> int:
    """Write BASE with every IN added: W' = W + sum of weight * (update of W), in fp32, rounded once.

    The output has BASE's files, tensor names, order, dtypes and metadata. Everything is checked by the headers before
    the first byte; memory is a few megabytes. The report says how large each update is against its base, and how wrong
    rounding to the base's dtype makes it.
    """
    from loratools import gates
    from loratools.cli import _model, _session
    from loratools.ops.merge import merge

    gate = gates.parse(fail_on)
    base, adapters = _model.read(
        base_path, paths, format=format, allow_unknown=allow_unknown, allow_fp8=requantise, device=running.device
    )
    target = output or _model.default_output(base_path, "merged")
    with _session.working(running, reporting, total_bytes=_model.nbytes(base)):
        report = merge(
            base,
            adapters,
            target,
            weights=_model.weights(weights, len(paths)),
            rounding=rounding,
            seed=running.seed,
            measure=not no_measure,
            undo_file=undo,
            resume=resume,
            overwrite=overwrite,
            untie=untie,
            requantise=requantise,
            altered_base=altered_base,
            dry_run=dry_run,
            accept=_model.accepts(gate),
        )
    return _model.deliver(report, base, adapters, gate, _model.Shown(target, dry_run, reporting), COLUMNS,
                          worst="rounding_loss")  # fmt: skip
