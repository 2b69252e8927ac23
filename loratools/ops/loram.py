"""Adapters trained on a structurally pruned model, scattered back to the full one (LoRAM, arXiv:2502.13533).

Pruning keeps some rows and columns of each parameter. An adapter of the small model acts on the full one as
b[rows] = b_small, a[:, columns] = a_small, zero elsewhere: exactly the same update on what was kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from loratools.core.adapter import Adapter
from loratools.core.update import Array, Leaf, Update, namespace
from loratools.errors import MismatchError, UnsupportedError
from loratools.kinds.lowrank import LowRank
from loratools.kinds.replace import Replace
from loratools.linalg.namespace import dtype_name
from loratools.report import Report


@dataclass(frozen=True)
class Kept:
    """Rows and columns of a full (m, n) parameter that pruning kept, ascending; None: all of them."""

    shape: tuple[int, int]
    rows: tuple[int, ...] | None = None
    columns: tuple[int, ...] | None = None

    @property
    def small(self) -> tuple[int, int]:
        """Shape of the pruned parameter."""
        m, n = self.shape
        return (m if self.rows is None else len(self.rows), n if self.columns is None else len(self.columns))


def scatter(adapter: Adapter, kept: Mapping[str, Kept]) -> Adapter:
    """Return the adapter of the full model: ``kept`` maps its parameter names; the others were not pruned.

    The factors keep their bits; new entries are zero. Raises MismatchError (the first three and the count) where an
    update does not have the shape that pruning left, UnsupportedError for a DoRA (its norms were those of the small
    base) or a parameter stored whole.
    """
    _check(adapter, kept)
    done = replace(adapter, updates={n: _scattered(u, kept[n]) if n in kept else u for n, u in adapter.items()})
    pruned = sum(name in kept for name in adapter)
    rows = tuple(_row(name, u, done[name]) for name, u in adapter.items())
    report = Report(
        "loratools.recover/1", rows, {"modules": len(rows), "scattered": pruned}, UNITS, adapter.meta.remarks
    )
    return replace(done.with_history(f"scattered {pruned} modules to the full model"), report=report)


UNITS = {"shape_before": "shape of the update as trained", "shape_after": "shape of the full parameter"}


def shrink(adapter: Adapter, kept: Mapping[str, Kept]) -> Adapter:
    """Return the adapter of the pruned model: the kept rows and columns of every update; the inverse of scattering."""
    return replace(adapter, updates={n: _cut(u, kept[n]) if n in kept else u for n, u in adapter.items()})


def _check(adapter: Adapter, kept: Mapping[str, Kept]) -> None:
    wrong = [
        f"{n}: {u.shape}, pruned {kept[n].small}" for n, u in adapter.items() if n in kept and u.shape != kept[n].small
    ]
    lost = [name for name in kept if name not in adapter]
    if wrong:
        raise MismatchError(
            f"{len(wrong)} updates do not have the shape that pruning left", file=adapter.meta.path,
            got="; ".join(wrong[:3]), hint="check that the index belongs to this adapter",
        )  # fmt: skip
    if len(lost) == len(kept):
        raise MismatchError("the index names no module of this adapter", expected=", ".join(list(adapter)[:3]),
                            got=", ".join(lost[:3]))  # fmt: skip
    for name, u in adapter.items():
        if name in kept and not isinstance(u, LowRank):
            why = "its magnitudes belong to the pruned base" if u.kind == "dora" else "it is stored whole"
            raise UnsupportedError(f"a {u.kind} update is not scattered: {why}", parameter=name)


def _scattered(u: Update, kept: Kept) -> Update:
    assert isinstance(u, LowRank)  # _check
    b, a = _read(u.b), _read(u.a)
    m, n = kept.shape
    tall = b if kept.rows is None else _spread(b, kept.rows, m)
    wide = a if kept.columns is None else _spread(a.T, kept.columns, n).T
    return LowRank(tall, wide, u.scale, kept.shape)


def _spread(x: Array, places: Sequence[int], size: int) -> Array:
    """Return (size, r) with the rows of x (k, r) at ``places`` and zeros elsewhere."""
    xp = namespace(x)
    source = [len(places)] * size  # the row of zeros that is put behind x
    for i, place in enumerate(places):
        source[place] = i
    padded = xp.concat([x, xp.zeros((1, x.shape[1]), dtype=x.dtype, device=x.device)], axis=0)
    return xp.take(padded, xp.asarray(source, device=x.device), axis=0)


def _cut(u: Update, kept: Kept) -> Update:
    if not isinstance(u, LowRank):
        raise UnsupportedError(f"a {u.kind} update is not cut")
    b, a = _read(u.b), _read(u.a)
    xp = namespace(b)
    tall = b if kept.rows is None else xp.take(b, xp.asarray(list(kept.rows), device=b.device), axis=0)
    wide = a if kept.columns is None else xp.take(a, xp.asarray(list(kept.columns), device=a.device), axis=1)
    return LowRank(tall, wide, u.scale)


def _read(t: Leaf | Array) -> Array:
    return t.read() if isinstance(t, Leaf) else t


def _row(name: str, before: Update, after: Update) -> dict[str, object]:
    dtype = dtype_name(before.value) if isinstance(before, Replace) else None
    return {"name": name, "kind": before.kind, "shape_before": list(before.shape), "shape_after": list(after.shape),
            **({"dtype": dtype} if dtype else {})}  # fmt: skip
