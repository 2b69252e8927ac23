"""``loratools extract``."""

from __future__ import annotations

from pathlib import Path

import click

from loratools.cli import _options, _show

COLUMNS: tuple[_show.Column, ...] = (
    ("name", "parameter", str),
    ("kind", "kind", str),
    ("rank", "rank", str),
    ("energy", "energy", _show.percent),
    ("relative_error", "rel. error", _show.small),
    ("noise_floor", "noise floor", _show.small),
    ("relative_norm", "of base", _show.small),
)


@click.command("extract", short_help="A LoRA out of a full fine-tune.")
@click.argument("base_path", metavar="BASE", type=click.Path(path_type=Path))
@click.argument("tuned_path", metavar="TUNED", type=click.Path(path_type=Path))
@click.option("--rank", metavar="N|noise", help="Rank of every module, or what stands above TUNED's own rounding.")
@click.option("--energy", type=float, help="Smallest rank that keeps this share of the squared norm, e.g. 0.9.")
@click.option("--error", type=float, help="Smallest rank with at most this relative error, e.g. 0.3.")
@click.option("--max-rank", type=int, help="Never more than this, whatever the target.")
@click.option("--exact", is_flag=True, help="Dense SVD instead of the randomised one (within 0.5% of the optimum).")
@click.option(
    "--no-carry", is_flag=True, help="Only name changed biases, norms and embeddings instead of keeping them."
)
@click.option("--format", "format", metavar="NAME", default="peft", show_default=True, help="Format to write.")
@_options.writing
@_options.running
@_options.reporting
def command(
    *,
    base_path: Path,
    tuned_path: Path,
    rank: str | None,
    energy: float | None,
    error: float | None,
    max_rank: int | None,
    exact: bool,
    no_carry: bool,
    format: str,
    output: Path | None,
    overwrite: bool,
    dtype: str | None,
    dry_run: bool,
    fail_on: str | None,
    seed: int,
    device: str,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Write the adapter that leads from BASE to TUNED: the best low-rank update of every changed matrix.

    Exactly one of --rank, --energy, --error. Both checkpoints are streamed, matrix by matrix. Biases, norms, embeddings
    and new heads that changed are kept whole. The report gives energy, error and the floor that TUNED's own rounding
    sets, per module.
    """
    from loratools import gates
    from loratools.cli import _model, _session
    from loratools.io.output import check_output
    from loratools.ops.extract import extract
    from loratools.ops.ranks import Target

    gate = gates.parse(fail_on)
    suffix = Target.of(rank=rank, energy=energy, error=error, max_rank=max_rank).suffix
    _model.cpu_only(device, "extract")
    base, tuned = _model.open_model(base_path), _model.open_model(tuned_path)
    target = output or _model.default_output(tuned_path, f"lora-{suffix}").with_suffix("")
    if not dry_run:
        check_output(target, [base_path, tuned_path], overwrite)
    with _session.working(threads=threads, quiet=quiet or as_json, total_bytes=_model.nbytes(tuned)):
        done = extract(
            base,
            tuned,
            rank=rank,
            energy=energy,
            error=error,
            max_rank=max_rank,
            exact=exact,
            carry=not no_carry,
            dtype=dtype,
            seed=seed,
        )
    to = _session.Target(target, overwrite, dry_run, as_json, quiet)
    assert done.report is not None
    return _session.deliver(done, [], to, gate, columns=COLUMNS, worst="relative_error", base=base, format=format,
                            models=[_model.model_input(base), _model.model_input(tuned)])  # fmt: skip
