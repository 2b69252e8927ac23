"""resize: exactly one rank everywhere, up or down."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from loratools.core.adapter import Adapter
from loratools.files import BaseLike, open_base
from loratools.kinds.lowrank import low_ranks
from loratools.ops.ranks import Target
from loratools.ops.squeeze import How, in_factors, squeezed

if TYPE_CHECKING:
    from loratools.io.stats import StatsLike


def resize(
    adapter: Adapter,
    *,
    rank: int,
    dtype: str | None = None,
    base: BaseLike | None = None,
    allow_nonfinite: bool = False,
    stats: StatsLike | None = None,
) -> Adapter:
    """Return the adapter with exactly ``rank`` columns in every module.

    Down: the optimal truncation. Up: zero columns in b keep the function, random rows in a let the new channels train.
    Scales are kept, so that training can go on as it was. DoRA magnitudes and ``stats`` as in ``squeeze``.
    ``report`` has the same figures; the same errors are raised.
    """
    target = Target(rank=rank)
    opened = open_base(base)
    adapter, originals = in_factors(adapter, opened, rank if stats is None else None)
    ranks = {name: rank for name, update in adapter.items() if low_ranks(update) is not None}
    weigh = None
    if stats is not None:
        from loratools.ops.weighing import weighing

        weigh = weighing(stats, adapter, opened, target)
    how = How(target, ranks, dtype, True, allow_nonfinite, weighing=weigh)
    done, report = squeezed(adapter, how, opened, originals)
    report = report.with_(schema="loratools.resize/1")
    return replace(done.with_history(f"resize {how.words}"), report=report)
