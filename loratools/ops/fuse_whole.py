"""What is stored whole (heads, embeddings, rows) has no weighted sum: it is equal in all inputs, or chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from loratools.core.adapter import Adapter
from loratools.core.rows import row_ranges, slice_rows
from loratools.core.update import Array, Leaf, Update, is_tensor, shape_of
from loratools.errors import MismatchError, UsageError
from loratools.linalg.namespace import dtype_name, raw_bytes
from loratools.ops.fuse_inputs import Row, is_whole

BLOCK_BYTES = 16 << 20


def chosen(adapters: Sequence[Adapter], names: Sequence[str], take: str | None) -> int | None:
    """Return the position of the adapter that ``take`` names: by label, path, or number from 1.

    Raises UsageError with the names there are.
    """
    if take is None:
        return None
    paths = [str(a.meta.path) for a in adapters]
    homes = [str(a.meta.path.parent) if a.meta.path else "" for a in adapters]
    for known in (list(names), [str(i + 1) for i in range(len(names))], paths, homes):
        if known.count(take.rstrip("/")) == 1:
            return known.index(take.rstrip("/"))
    from difflib import get_close_matches

    close = get_close_matches(take, names, n=1)
    raise UsageError(
        f"--take: no input named {take!r}", expected=", ".join(names),
        hint=f"did you mean {close[0]!r}?" if close else None,
    )  # fmt: skip


def whole_updates(rows: Mapping[str, Row], names: Sequence[str], take: int | None) -> dict[str, Update]:
    """Return the parameters stored whole: those of ``take``, or those that are equal in all inputs.

    A parameter that one input stores whole and another one changes additively needs ``take``, too. Raises MismatchError
    with the first three that differ and the count.
    """
    stored = {name: row for name, row in rows.items() if is_whole(row)}
    if take is not None:
        return {name: u for name, row in stored.items() if (u := row[take]) is not None}
    wrong = [f"{name} ({why})" for name, row in stored.items() if (why := _difference(row, names))]
    if wrong:
        raise MismatchError(
            f"{len(wrong)} parameters are stored whole, and not equal in all inputs",
            got="; ".join(wrong[:3]), hint=f"--take NAME decides: {', '.join(names)}",
        )  # fmt: skip
    return {name: row[0] for name, row in stored.items() if row[0] is not None}


def _difference(row: Row, names: Sequence[str]) -> str | None:
    """Return why the updates are not all equal, or None."""
    first = row[0]
    for name, u in zip(names, row, strict=True):
        if u is None:
            return f"{name} lacks it"
        if first is None:
            return f"{names[0]} lacks it"
        if not same(first, u):
            return f"{names[0]} and {name} differ"
    return None


def leftovers(adapters: Sequence[Adapter], names: Sequence[str], take: int | None) -> Mapping[str, Leaf | Array]:
    """Return the tensors carried under their own keys, by the same rule."""
    if take is not None:
        return adapters[take].meta.leftover
    first = adapters[0].meta.leftover
    for name, adapter in zip(names, adapters, strict=True):
        other = adapter.meta.leftover
        wrong = [key for key in {**first, **other} if key not in first or key not in other]
        wrong = wrong or [key for key in first if not same(first[key], other[key])]
        if wrong:
            raise MismatchError(
                f"{len(wrong)} carried tensors are not equal in {names[0]} and {name}",
                got=", ".join(wrong[:3]), hint=f"--take NAME decides: {', '.join(names)}",
            )  # fmt: skip
    return first


def same(x: Any, y: Any) -> bool:
    """Tell whether two updates, or two fields of them, are equal to the byte; large tensors are read in blocks."""
    if x is y:
        return True
    if isinstance(x, Update) and isinstance(y, Update):
        return type(x) is type(y) and all(
            same(getattr(x, f.name), getattr(y, f.name))
            for f in fields(x)  # type: ignore[arg-type]
        )
    if is_tensor(x) and is_tensor(y):
        return _same_tensor(x, y)
    return bool(x == y)


def _same_tensor(x: Leaf | Array, y: Leaf | Array) -> bool:
    if shape_of(x) != shape_of(y) or dtype_name(x) != dtype_name(y):
        return False
    if not shape_of(x):
        return bool(raw_bytes(x) == raw_bytes(y))
    ranges = row_ranges(x, BLOCK_BYTES)
    return all(bool(raw_bytes(slice_rows(x, i, j)) == raw_bytes(slice_rows(y, i, j))) for i, j in ranges)
