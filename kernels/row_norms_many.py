"""Row norms of many sums: which form serves which, and the fused body of ``linalg.row_norms.row_norms_many``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loratools.dispatch import fuses
from loratools.kernels.row_norms import direct, fits, in_range
from loratools.kernels.row_norms_shared import shared
from loratools.kernels.target import Tensor, usable
from loratools.linalg.row_norms import row_norms, row_norms_many

SHARED_RANK = 128
"""Ranks up to which adapters on one base share its read; above, tensor cores are the floor (see row_norms_shared)."""


def accepts(ws: Sequence[Any], bs: Sequence[Any], as_: Sequence[Any], scales: Sequence[float]) -> bool:
    """True for matrices of fp32, bf16 or fp16 on one GPU, the rows of every W contiguous, every rank at least 1."""
    if not (usable(*ws, *bs, *as_) and len(ws) == len(bs) == len(as_) == len(scales)):
        return False
    return all(fits(w, b, a) for w, b, a in zip(ws, bs, as_, strict=True))


@fuses(row_norms_many, when=accepts)
def fused_row_norms(
    ws: Sequence[Tensor], bs: Sequence[Tensor], as_: Sequence[Tensor], scales: Sequence[float]
) -> list[Tensor]:
    """Return the row norms of every w + scale b a in fp32; several small adapters on one w read it once.

    Sums whose squares leave fp32 go to the textbook, which takes them in fp64.
    """
    found: dict[int, Tensor] = {}
    for group in _by_base(ws):
        if len(group) > 1 and max(bs[i].shape[1] for i in group) <= SHARED_RANK:
            done = shared(ws[group[0]], [bs[i] for i in group], [as_[i] for i in group], [scales[i] for i in group])
        else:
            done = [direct(ws[i], bs[i], as_[i], scales[i]) for i in group]
        found.update(zip(group, done, strict=True))
    norms = [found[i] for i in range(len(ws))]
    return [
        x if fine else row_norms(ws[i], bs[i], as_[i], scale=scales[i])
        for i, (x, fine) in enumerate(zip(norms, in_range(norms), strict=True))
    ]


def _by_base(ws: Sequence[Tensor]) -> list[list[int]]:
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, w in enumerate(ws):
        groups.setdefault((w.data_ptr(), w.shape, w.stride(), w.dtype), []).append(i)
    return list(groups.values())
