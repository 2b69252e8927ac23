"""``loratools dequantize``."""

from __future__ import annotations

from pathlib import Path

import click

from loratools.cli import _options, _show

COLUMNS: tuple[_show.Column, ...] = (
    ("name", "module", str),
    ("kind", "kind", str),
    ("bytes_before", "bytes", _show.size),
    ("bytes_after", "->", _show.size),
)


@click.command("dequantize", short_help="A quantised adapter back as plain factors.")
@_options.IN
@click.option("--to", metavar="FORMAT", help="Format to write (default: that of the file which was quantised).")
@click.option(
    "--like",
    type=click.Path(path_type=Path),
    help="IN is in the headerless bytes of Binary Adapters: an adapter of the same modules and ranks.",
)
@click.option("--bits", type=int, default=1, show_default=True, help="Bits of the codes, with --like.")
@_options.reading
@_options.writing
@_options.running
@_options.reporting
def command(
    *,
    path: Path,
    to: str | None,
    like: Path | None,
    bits: int,
    reading: _options.Reading,
    writing: _options.Writing,
    running: _options.Running,
    reporting: _options.Reporting,
) -> int:
    """Write IN, a quantised adapter, as plain factors (float16 unless --dtype) that every program loads.

    Unpacking gives the same bits on every machine. Headerless files of Binary Adapters (arXiv:2307.16867) do not say
    what they hold: --like names an adapter of the same modules and ranks, in the same order.
    """
    from loratools import gates
    from loratools.cli import _session
    from loratools.cli._names import placed, written_as
    from loratools.files import load
    from loratools.ops.dequantise import dequantize

    gate = gates.parse(writing.fail_on)
    if like is not None:
        from loratools.formats.binary_bytes import from_bytes
        from loratools.io.output import read_bytes

        opened = None
        adapter = from_bytes(read_bytes(path), load(like), bits, path=path)
    else:
        adapter, opened = _session.read(path, reading, running.device)
    chosen = to or adapter.meta.source
    target = writing.output or placed(path.absolute(), chosen, "plain")
    shown = _session.Target(target, writing, reporting)
    shown.check([written_as(adapter, chosen)])
    with _session.working(running, reporting, total_bytes=adapter.nbytes):
        done = dequantize(adapter, dtype=writing.dtype or "float16")
    return _session.deliver(done, [adapter], shown, gate, columns=COLUMNS, worst=None, base=opened, format=chosen)
