"""``loratools extract``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


SPARSE: tuple[_show.Column, ...] = (
    ("name", "parameter", str),
    ("kind", "kind", str),
    ("nnz", "entries", str),
    ("density", "density", _show.percent),
    ("energy", "energy", _show.percent),
    ("relative_error", "rel. error", _show.small),
    ("bytes_after", "bytes", _show.size),
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
@click.option("--sparse", is_flag=True, help="A sparse adapter (SHiRA) instead: the entries that moved most.")
@click.option("--density", type=float, help="With --sparse: share of the entries to keep, e.g. 0.01.")
@click.option(
    "--plus-lowrank", type=int, metavar="N", help="With --sparse: best part of rank N, plus entries of the rest."
)
@click.option("--mask", metavar="NAME", help="With --sparse: magnitude (default), weight, snip, random or struct.")
@click.option("--scope", metavar="NAME", help="With --sparse: count per module (default), or global.")
@click.option("--keep-base", is_flag=True, help="With --sparse: store BASE's values at the entries, for undoing.")
@click.option(
    "--format",
    "format",
    metavar="NAME",
    help="Format to write (default: peft; native for --plus-lowrank, --scope global and --keep-base).",
)
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
    sparse: bool,
    density: float | None,
    plus_lowrank: int | None,
    mask: str | None,
    scope: str | None,
    keep_base: bool,
    format: str | None,
    writing: _options.Writing,
    running: _options.Running,
    reporting: _options.Reporting,
) -> int:
    """Write the adapter that leads from BASE to TUNED: the best low-rank update of every changed matrix.

    Exactly one of --rank, --energy, --error, or --sparse with --density: then the entries of every matrix that moved
    most. Both checkpoints are streamed, matrix by matrix. Biases, norms, embeddings and new heads that changed are kept
    whole. The report gives energy, error and the floor that TUNED's own rounding
    sets, per module.
    """
    from loratools import gates
    from loratools.cli import _model, _session
    from loratools.errors import MismatchError
    from loratools.io.output import check_output
    from loratools.ops.extract import extract
    from loratools.ops.ranks import Target

    gate = gates.parse(writing.fail_on)
    words = {"density": density, "plus_lowrank": plus_lowrank, "mask": mask, "scope": scope}
    if sparse:
        dense = {"rank": rank, "energy": energy, "error": error, "max_rank": max_rank, "exact": exact or None}
        _only_sparse(dense)
        return _sparse(base_path, tuned_path, words, keep_base, format, not no_carry, gate, writing, running, reporting)
    _only_dense({**words, "keep_base": keep_base or None})
    format = format or "peft"
    suffix = Target.of(rank=rank, energy=energy, error=error, max_rank=max_rank).suffix
    _model.cpu_only(running.device, "extract")
    base, tuned = _model.open_model(base_path), _model.open_model(tuned_path)
    target = writing.output or _model.default_output(tuned_path, f"lora-{suffix}").with_suffix("")
    if not writing.dry_run:
        check_output(target, [base_path, tuned_path], writing.overwrite)
    with _session.working(running, reporting, total_bytes=_model.nbytes(tuned)):
        done = extract(
            base,
            tuned,
            rank=rank,
            energy=energy,
            error=error,
            max_rank=max_rank,
            exact=exact,
            carry=not no_carry,
            dtype=writing.dtype,
            seed=running.seed,
        )
    if not done:
        told = () if done.report is None else done.report.warnings
        raise MismatchError("there is nothing to write", file=tuned_path, expected="a model that differs from BASE",
                            got="; ".join(told) or "no parameter that differs")  # fmt: skip
    to = _session.Target(target, writing, reporting)
    assert done.report is not None
    return _session.deliver(done, [], to, gate, columns=COLUMNS, worst="relative_error", base=base, format=format,
                            models=[_model.model_input(base), _model.model_input(tuned)])  # fmt: skip


def _only_sparse(given: Mapping[str, Any]) -> None:
    from loratools.errors import UsageError

    names = [name for name, value in given.items() if value is not None]
    if names:
        raise UsageError("--sparse counts entries, not ranks", expected="--density D", got=f"--{names[0]}")


def _only_dense(given: Mapping[str, Any]) -> None:
    from loratools.errors import UsageError

    names = [name.replace("_", "-") for name, value in given.items() if value is not None]
    if names:
        raise UsageError(f"--{names[0]} belongs to --sparse", hint="add --sparse")


def _sparse(
    base_path: Path, tuned_path: Path, words: Mapping[str, Any], keep_base: bool, format: str | None, carry: bool,
    gate: Any, writing: _options.Writing, running: _options.Running, reporting: _options.Reporting,
) -> int:  # fmt: skip
    from loratools.cli import _model, _session
    from loratools.errors import UsageError
    from loratools.io.output import check_output
    from loratools.ops.extract_sparse import extract_sparse
    from loratools.ops.sparsify import Sparsity

    if words["density"] is None:
        raise UsageError("--sparse needs --density", expected="a share of the entries, e.g. 0.01")
    mask, scope = words["mask"] or "magnitude", words["scope"] or "module"
    to = format or ("native" if scope == "global" or words["plus_lowrank"] is not None or keep_base else "peft")
    Sparsity(words["density"], mask, scope, words["plus_lowrank"], to)
    _model.cpu_only(running.device, "extract")
    base, tuned = _model.open_model(base_path), _model.open_model(tuned_path)
    plain = _model.default_output(tuned_path, f"shira{words['density']:g}").with_suffix("")
    target = writing.output or (plain if to == "peft" else plain.with_name(f"{plain.name}.safetensors"))
    if not writing.dry_run:
        check_output(target, [base_path, tuned_path], writing.overwrite)
    with _session.working(running, reporting, total_bytes=_model.nbytes(tuned)):
        done = extract_sparse(
            base, tuned, density=words["density"], plus_lowrank=words["plus_lowrank"], mask=mask, scope=scope,
            keep_base=keep_base, carry=carry, to=to, dtype=writing.dtype, seed=running.seed,
        )  # fmt: skip
    shown = _session.Target(target, writing, reporting)
    code = _session.deliver(done, [], shown, gate, columns=SPARSE, worst="relative_error", base=base, format=to,
                            models=[_model.model_input(base), _model.model_input(tuned)])  # fmt: skip
    if not reporting.silent:
        _show.density(done.report)
    return code
