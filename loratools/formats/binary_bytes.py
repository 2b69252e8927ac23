"""The headerless bytes of Binary Adapters (arXiv:2307.16867, the program's ``save_model`` and ``load_model``).

For each factor in the order of the modules, down (a) before up (b): the packed codes, then mean and deviation as
little-endian fp32; at the end the head's weight and bias in fp32. Names, shapes, bits and scale are in no file: an
adapter of the same modules tells them.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

from loratools.core.adapter import Adapter
from loratools.core.update import Array, Update, shape_of
from loratools.errors import ConversionError, FormatError
from loratools.io.dtypes import from_raw
from loratools.kinds.binary import Binary
from loratools.kinds.lowrank import LowRank, low_rank
from loratools.kinds.replace import Replace
from loratools.linalg.namespace import raw_bytes, up


def to_bytes(adapter: Adapter) -> bytes:
    """Return the bytes. ConversionError for an update that this layout cannot say."""
    parts: list[bytes] = []
    heads: list[bytes] = []
    for name, u in adapter.items():
        if isinstance(u, Binary):
            for codes, stats, size in ((u.a, u.a_stats, u.matrix_shape[1]), (u.b, u.b_stats, u.matrix_shape[0])):
                if size * u.rank * u.bits % 8:
                    raise ConversionError(
                        "the layout drops codes that do not fill their last byte", parameter=name,
                        expected=f"a multiple of {8 // u.bits} weights", got=size * u.rank,
                    )  # fmt: skip
                parts += [bytes(raw_bytes(codes)), bytes(raw_bytes(stats))]
        elif isinstance(u, Replace):
            heads.append(bytes(raw_bytes(up(u.value))))
        else:
            raise ConversionError(f"a {u.kind} update has no place in this layout", parameter=name)
    return b"".join([*parts, *heads])


def from_bytes(raw: bytes, like: Adapter, bits: int, *, path: Path | None = None) -> Adapter:
    """Return the adapter of the bytes, with names, shapes, ranks and scales of ``like``; an optional head at the end.

    Raises :class:`FormatError` where the length is another.
    """
    at = 0
    updates: dict[str, Update] = {}
    heads: dict[str, Replace] = {}
    for name, u in like.items():
        low = low_rank(u)
        if isinstance(u, Replace):
            heads[name] = u
        elif low is None:
            raise FormatError(f"a {u.kind} update has no place in this layout", parameter=name)
        else:
            updates[name], at = _read(raw, at, low, bits)
    head_bytes = sum(4 * prod(shape_of(h.value)) for h in heads.values())
    if len(raw) not in (at, at + head_bytes):
        expected = f"{at} bytes" + (f", or {at + head_bytes} with the head" if heads else "")
        raise FormatError("the file has another length", file=path, expected=expected, got=len(raw),
                          hint="check --like and --bits")  # fmt: skip
    for name, head in heads.items() if len(raw) > at else ():
        shape = shape_of(head.value)
        updates[name] = Replace(from_raw(raw[at : at + 4 * prod(shape)], "float32", shape))
        at += 4 * prod(shape)
    ordered = {name: updates[name] for name in like if name in updates}
    return Adapter(ordered, replace(like.meta, path=path, leftover={}, absorbed={}))


def _read(raw: bytes, at: int, low: LowRank, bits: int) -> tuple[Binary, int]:
    sides: list[Array] = []
    m, n = low.matrix_shape
    for size in (n, m):
        count = size * low.rank * bits // 8
        if len(raw) < at + count + 8:
            raise FormatError("the file ends early", expected=f"{at + count + 8} bytes or more", got=len(raw),
                              hint="check --like and --bits")  # fmt: skip
        sides += [from_raw(raw[at : at + count], "uint8", (count,))]
        sides += [from_raw(raw[at + count : at + count + 8], "float32", (2,))]
        at += count + 8
    a, a_stats, b, b_stats = sides
    return Binary(b, a, b_stats, a_stats, bits, low.rank, low.shape, low.scale), at
