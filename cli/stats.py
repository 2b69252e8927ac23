"""``loratools stats``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from loratools.cli import _options, _show

COLUMNS: tuple[_show.Column, ...] = (
    ("name", "module", str),
    ("inputs", "inputs", str),
    ("mean_square", "mean square", _show.small),
    ("peak", "peak / mean", _show.small),
    ("gradient_mean_square", "of gradients", _show.small),
    ("bytes", "bytes", _show.size),
)
UNITS = {
    "inputs": "size of the module's inputs",
    "mean_square": "mean square of an input's entries",
    "peak": "mean square of the largest channel / that mean",
    "gradient_mean_square": "mean square of an entry of the outputs' gradients; null without --gradients",
    "bytes": "bytes of the statistics",
}


@click.command("stats", short_help="What a model's linear layers see, for --stats of other commands.")
@click.argument("path", metavar="MODEL", type=click.Path(path_type=Path))
@click.option("--inputs", "tensors", metavar="FILE", type=click.Path(path_type=Path),
              help="safetensors file of the model's keyword arguments, samples along the first axis.")  # fmt: skip
@click.option("--text", metavar="FILE", type=click.Path(path_type=Path),
              help="Text file, one sample a line, for the tokenizer beside MODEL.")  # fmt: skip
@click.option("--adapter", metavar="IN", type=click.Path(path_type=Path),
              help="Collect only the modules that this adapter changes.")  # fmt: skip
@click.option("--gram", is_flag=True, help="Whole Gram matrices of the inputs (4 n^2 bytes a module), not diagonals.")
@click.option("--gradients", is_flag=True, help="Gradients of the outputs, too; --inputs must hold labels then.")
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Samples at a time.")
@click.option("--length", type=click.IntRange(1), default=512, show_default=True, help="Tokens of a line, at most.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Where to write (default: MODEL-stats.safetensors)."
)
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option("--dry-run", is_flag=True, help="Do everything but write.")
@click.option("--fail-on", metavar="EXPR", help="Exit 1 and write nothing where true, e.g. 'peak>1000'.")
@_options.running
@_options.reporting
def command(
    *,
    path: Path,
    tensors: Path | None,
    text: Path | None,
    adapter: Path | None,
    gram: bool,
    gradients: bool,
    batch: int,
    length: int,
    output: Path | None,
    overwrite: bool,
    dry_run: bool,
    fail_on: str | None,
    running: _options.Running,
    reporting: _options.Reporting,
) -> int:
    """Run samples through MODEL and write the second moments of what its linear layers see.

    Needs torch and transformers (pip install 'loratools[calibrate]'). MODEL is a directory with config.json; nothing is
    fetched from a network. Commands with --stats take the file: squeeze, resize, fuse --method regmean.
    """
    from loratools import gates
    from loratools.calibrate.collect import collect_stats
    from loratools.calibrate.model import load_model, tensor_batches, text_batches
    from loratools.cli import _model, _session
    from loratools.errors import UsageError
    from loratools.io.base import Base
    from loratools.io.stats import save_stats
    from loratools.io.write import check_output

    if (tensors is None) == (text is None):
        raise UsageError("what shall the model see?", expected="--inputs FILE or --text FILE, one of them")
    gate = gates.parse(fail_on, tuple(UNITS))
    base = Base.open(path)
    target = output or _model.default_output(path, "stats").with_suffix(".safetensors")
    if not dry_run:
        check_output(target, inputs=[path, *(p for p in (tensors, text) if p is not None)], overwrite=overwrite)
    where = _session._device(running.device)
    wanted = None if adapter is None else _modules(adapter, base)
    _threads(running.threads)
    model = load_model(path, device=where)
    if tensors is not None:
        batches = tensor_batches(tensors, batch=batch, device=where)
    else:
        assert text is not None
        batches = text_batches(text, path, batch=batch, length=length, labels=gradients, device=where)
    found = collect_stats(model, batches, gram=gram, gradients=gradients, modules=wanted)
    report = gates.check(gate, _report(found))
    failed = not all(check["ok"] for check in report.checks)
    written = None if dry_run or failed else save_stats(found, target, overwrite=overwrite)
    full = _session.described(report, [], written, as_json=reporting.as_json)
    full = full.with_(inputs=(_model.model_input(base),))
    _show.show(full, reporting, columns=_filled(gradients), worst="peak")
    if not reporting.silent:
        click.echo("nothing written" if written is None else f"wrote {written}")
    return int(failed)


def _filled(gradients: bool) -> tuple[_show.Column, ...]:
    return tuple(c for c in COLUMNS if gradients or c[0] != "gradient_mean_square")


def _modules(path: Path, base: Any) -> frozenset[str]:
    """Return the modules of the model that an adapter changes."""
    from loratools.files import load

    adapter = load(path, base=base)
    return frozenset(name.removesuffix(".weight") for name in base.resolve(adapter, adapter).values())


def _threads(count: int | None) -> None:
    """Give torch the threads that were asked for: the command line has set its BLAS to one before."""
    from loratools.core.pool import thread_count

    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(count or thread_count())


def _report(found: Mapping[str, Any]) -> Any:
    from loratools.report import Report

    rows = tuple(_row(name, stats) for name, stats in found.items())
    total = {
        "modules": len(rows),
        "peak": max(row["peak"] for row in rows),
        "bytes": sum(row["bytes"] for row in rows),
    }
    return Report("loratools.stats/1", rows, total, UNITS)


def _row(name: str, stats: Any) -> dict[str, Any]:
    diagonal = stats.in_gram.read().diagonal() if stats.in_gram is not None else stats.in_diag.read()
    mean = float(diagonal.mean())
    kept = [leaf for leaf in (stats.inputs, stats.out_diag) if leaf is not None]
    return {
        "name": name,
        "inputs": int(diagonal.shape[0]),
        "mean_square": mean,
        "peak": float(diagonal.max()) / mean if mean else 0.0,
        "gradient_mean_square": None if stats.out_diag is None else float(stats.out_diag.read().mean()),
        "bytes": sum(leaf.nbytes for leaf in kept),
    }
