"""Sparse updates fused on the union of their supports, without forming anything else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

from loratools.core.update import Delta, namespace, working_dtype
from loratools.errors import MismatchError, UsageError
from loratools.fusion.elements import agreed, weighted_sum
from loratools.kinds.sparse import Sparse, of_entries, united
from loratools.linalg.namespace import device_of, dtype_name


def all_sparse(deltas: Sequence[Delta]) -> TypeGuard[Sequence[Sparse]]:
    """Tell whether all updates are sparse (and there is one)."""
    return bool(deltas) and all(isinstance(d, Sparse) for d in deltas)


def sparse_union(
    deltas: Sequence[Sparse], weights: Sequence[float], *, elect: bool = True, working: bool = False
) -> Sparse:
    """Return the weighted updates added on the union of their supports.

    With ``elect``, entries that several updates hold take the sign of their weighted sum and add only what agrees with
    it (the sign election of TIES, arXiv:2306.01708, without trimming or averaging). Where supports are disjoint the
    result is the same bits in any order. Values are stored in the first one's dtype, or with ``working`` in that of
    arithmetic. O(nnz log nnz). Raises MismatchError for different shapes.
    """
    if not deltas or len(deltas) != len(weights):
        raise UsageError("one weight per update is needed", expected=len(deltas), got=len(weights))
    if any(u.shape != deltas[0].shape for u in deltas):
        raise MismatchError("updates of different shapes", got=", ".join(str(u.shape) for u in deltas[:3]))
    union, places = united(deltas)
    xp = namespace(union)
    rows = []
    for u, w, place in zip(deltas, weights, places, strict=True):
        row = xp.zeros(union.shape, dtype=xp.float64, device=device_of(union))
        row[place] = w * u.numbers("float64")
        rows.append(row)
    found = agreed(rows, [1.0] * len(rows)) if elect else weighted_sum(rows, [1.0] * len(rows))
    dtype = working_dtype(*(u.values for u in deltas)) if working else dtype_name(deltas[0].values)
    return of_entries(union, found, deltas[0].shape, dtype=dtype)
