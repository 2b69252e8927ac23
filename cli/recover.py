"""``loratools recover``."""

from __future__ import annotations

from pathlib import Path

import click

from loratools.cli import _options, _show

COLUMNS: tuple[_show.Column, ...] = (
    ("name", "module", str),
    ("rank_before", "rank", str),
    ("rank_after", "->", str),
    ("update_norm", "update", _show.small),
    ("uncertainty", "uncertainty", _show.small),
    ("shape_before", "shape", lambda shape: " x ".join(map(str, shape))),
    ("shape_after", "->", lambda shape: " x ".join(map(str, shape))),
)


@click.command("recover", short_help="An adapter of a changed base, made one of the original.")
@_options.IN
@click.option("--initial", type=click.Path(path_type=Path), help="IN as it was saved before training (PiSSA, ...).")
@click.option("--index", type=click.Path(path_type=Path), help="What pruning kept: our JSON, or LoRAM's directory.")
@click.option("--rank", type=int, help="Squeeze the result to this rank.")
@click.option("--energy", type=float, help="Squeeze to the smallest rank that keeps this share of the squared norm.")
@click.option("--error", type=float, help="Squeeze to the smallest rank with at most this relative error.")
@_options.reading
@_options.writing
@_options.running
@_options.reporting
def command(
    *,
    path: Path,
    initial: Path | None,
    index: Path | None,
    rank: int | None,
    energy: float | None,
    error: float | None,
    reading: _options.Reading,
    writing: _options.Writing,
    running: _options.Running,
    reporting: _options.Reporting,
) -> int:
    """Write the adapter of the original base that does what IN does on the base it was trained on.

    PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ changed the base when training began: with the adapter saved at that time
    (--initial) the result is exact, a plain LoRA of twice the rank; PiSSA and OLoRA also from the original base alone
    (--base). An adapter of a pruned model (LoRAM) is scattered back by --index.
    """
    from dataclasses import replace

    from loratools import gates
    from loratools.cli import _model, _session
    from loratools.cli._names import default_output
    from loratools.files import cast, load
    from loratools.ops import altered, loram, loram_index
    from loratools.ops.squeeze import squeeze

    gate = gates.parse(writing.fail_on)
    _model.cpu_only(running.device, "recover")
    known = None if index is not None else reading.base  # a pruned adapter does not fit its full base yet
    adapter, opened = _session.read(path, reading._replace(base=known))
    to = _session.Target(writing.output or default_output(path, adapter, "plain"), writing, reporting)
    to.check([adapter])
    inputs = [adapter]
    with _session.working(running, reporting, total_bytes=adapter.nbytes):
        if index is not None:
            opened = None if reading.base is None else _model.open_model(Path(reading.base))
            done = loram.scatter(adapter, loram_index.read_index(index, adapter, opened))
        else:
            first = None
            if initial is not None:
                first = load(initial, format=reading.format, base=opened, allow_unknown=reading.allow_unknown)
            inputs += [] if first is None else [first]
            done = altered.recover(adapter, initial=first, base=opened)
        report = done.report
        if (rank, energy, error) != (None, None, None):
            done = squeeze(done, rank=rank, energy=energy, error=error)
        if (dtype := writing.dtype) is not None:
            done = done.map(lambda _, u: cast(u, dtype))
    done = replace(done, report=report)
    return _session.deliver(done, inputs, to, gate, columns=COLUMNS, worst=None, base=opened)
