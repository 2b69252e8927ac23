"""``--type miss``: the mean of every class of columns."""

from __future__ import annotations

from loratools.core.adapter import Adapter
from loratools.errors import UsageError
from loratools.files import BaseLike
from loratools.leaf import Array
from loratools.linalg.namespace import namespace
from loratools.ops.types.base import adapter_type
from loratools.ops.types.projected import Type, named, projected, shapes_of


@adapter_type("miss")
def to_miss(adapter: Adapter, base: BaseLike | None = None, *, rank: int | None = None) -> Adapter:
    """MiSS of --rank (64): columns of D that are congruent modulo r become equal, their mean.

    D[:, c] = block[c mod r, :]; the mean is the orthogonal projection onto such matrices. Lossy; projecting again
    changes nothing. Cost: D is formed.
    """
    adapter = named(adapter)
    narrow = min((shape[1] for shape in shapes_of(adapter).values()), default=1)
    r = min(64, narrow) if rank is None else rank
    if not 1 <= r <= narrow:
        raise UsageError("rank out of range", expected=f"1 to {narrow}, the fewest inputs", got=r)
    fields = {"r": r, "init_weights": True, "miss_dropout": 0.0, "mini_r": 1}
    return projected(adapter, base, Type("MISS", fields), lambda name, d: {"miss_block": column_means(d, r)})


def column_means(d: Array, r: int) -> Array:
    """Return the (r, m) block whose row j is the mean of the columns j, j + r, j + 2 r, ... of d (m, n)."""
    xp = namespace(d)
    return xp.stack([xp.mean(d[:, j::r], axis=1) for j in range(r)], axis=0)
