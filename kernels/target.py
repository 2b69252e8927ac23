"""Which tensors a kernel may take, how it finds them, and whether Triton compiles or interprets."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
import triton.language as tl

Tensor: TypeAlias = torch.Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")
"""Read when Triton reads it: at import. Interpreted kernels run on tensors in ordinary memory."""

FLOATS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
"""Storage dtypes that kernels read."""

VECTOR_BYTES = 16
"""What one thread loads at once where addresses allow it."""


def usable(*tensors: Any) -> bool:
    """True if all are strided torch tensors of a short float, not empty, on one device where kernels run."""
    first = tensors[0] if tensors else None
    return isinstance(first, torch.Tensor) and _runs_on(first.device) and all(_fits(x, first.device) for x in tensors)


def _runs_on(device: torch.device) -> bool:
    return device.type == "cpu" if INTERPRETED else device.type == "cuda" and torch.version.hip is None


def _fits(x: Any, device: torch.device) -> bool:
    if not isinstance(x, torch.Tensor) or x.layout != torch.strided or x.device != device:
        return False
    return x.dtype in FLOATS and x.numel() > 0


def common(*tensors: Tensor) -> torch.dtype:
    """Return the storage dtype that all share, else fp32: tensor cores take one dtype."""
    dtypes = {x.dtype for x in tensors}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def by_rows(x: Tensor) -> Tensor:
    """Return ``x`` with contiguous rows: itself, or a copy."""
    return x if x.stride(-1) == 1 and x.stride(-2) >= x.shape[-1] else x.contiguous()


def is_aligned(x: Tensor) -> bool:
    """True if every row of a matrix begins at a multiple of 16 bytes and is a whole number of such vectors."""
    step = VECTOR_BYTES // x.element_size()
    return bool(x.data_ptr() % VECTOR_BYTES == 0 and x.stride(-2) % step == 0 and x.shape[-1] % step == 0)


def stretches(rows: Sequence[Sequence[int]], lengths: Sequence[int], most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the work items of a grouped launch: each row, followed by begin and end of a stretch of its length.

    ``lengths`` are cut every ``most``; with the items comes where those of each row begin, and their number at the end.
    """
    long = np.array(lengths)
    first = np.concatenate([[0], np.cumsum(-(-long // most))])
    row = np.repeat(np.arange(len(rows)), np.diff(first))
    begin = (np.arange(first[-1]) - first[row]) * most
    return np.column_stack([np.array(rows)[row], begin, np.minimum(begin + most, long[row])]), first


def table(rows: Sequence[Sequence[int]] | np.ndarray, device: torch.device) -> Tensor:
    """Return a table of whole numbers and addresses, int64, on the device."""
    return torch.from_numpy(np.ascontiguousarray(rows, dtype=np.int64)).to(device)


def power_of_two(count: int, least: int = 16) -> int:
    """Return the smallest power of two that is at least both: the shape of a tile, of which tensor cores ask 16."""
    return max(least, 1 << (count - 1).bit_length())
