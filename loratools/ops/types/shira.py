"""``--type shira``: the largest entries of every update, as many as PEFT's layout has room for."""

from __future__ import annotations

from typing import Any

from loratools.core.adapter import Adapter
from loratools.core.update import Update, working_dtype
from loratools.errors import UsageError
from loratools.files import BaseLike
from loratools.kinds.sparse import Sparse, of_entries
from loratools.leaf import Array, Leaf
from loratools.linalg.namespace import namespace, up
from loratools.ops.fold import square
from loratools.ops.types.base import adapter_type
from loratools.ops.types.projected import named, shapes_of
from loratools.ops.types.walk import finished, walk


@adapter_type("shira")
def to_shira(adapter: Adapter, base: BaseLike | None = None, *, rank: int | None = None) -> Adapter:
    """SHiRA of --rank (32): the r (in + out) entries of largest magnitude in every module; ``shira`` knows other masks.

    The best approximation with so many entries. Lossy; projecting again changes nothing. Cost: D is formed and sorted.
    """
    adapter = named(adapter)
    most = min((m * n // (m + n) for m, n in shapes_of(adapter).values()), default=1)
    r = min(32, most) if rank is None else rank
    if not 1 <= r <= most:
        raise UsageError("rank out of range", expected=f"1 to {most}: r (in + out) entries per module", got=r)

    def one(name: str, u: Update, w: Leaf | Array | None) -> tuple[Update, dict[str, Any]]:
        d = u.delta(up(w, working_dtype(w)) if w is not None else None).dense()
        new = largest(d, r * sum(d.shape))
        total, lost = square(d), square(new.dense() - d)
        error = (lost / total) ** 0.5 if total else 0.0
        return new, {"name": name, "rank_before": None, "rank_after": None, "relative_error": error,
                     "update_norm": total**0.5}  # fmt: skip

    done, rows = walk(adapter, base, lambda u: True, lambda u: not hasattr(u, "matmul"), one)
    return finished(done, adapter, rows, "shira")


def largest(d: Array, count: int) -> Sparse:
    """Return the ``count`` entries of largest magnitude of d (m, n); of equal ones the first."""
    xp, flat = namespace(d), d.reshape(-1)
    order = xp.argsort(-xp.abs(flat), stable=True)[:count]
    places = xp.sort(order)
    return of_entries(places, xp.take(flat, places), tuple(d.shape))
