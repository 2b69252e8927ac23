"""The one lazy thing: a tensor that knows its shape and storage dtype and reads itself when asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

Array = Any  # numpy.ndarray or torch.Tensor: whatever the array API namespace understands

ITEMSIZE = {
    "bool": 1, "uint8": 1, "int8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e8m0fnu": 1,
    "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "int16": 2, "uint16": 2, "float16": 2, "bfloat16": 2,
    "int32": 4, "uint32": 4, "float32": 4, "int64": 8, "uint64": 8, "float64": 8, "complex64": 8,
}  # fmt: skip
"""Bytes per element, by the name that NumPy, ml_dtypes and torch share."""


@dataclass(frozen=True)
class Leaf:
    """Handle of a stored tensor. ``read()`` returns a fresh (or read-only) array of ``shape`` and ``dtype``.

    ``read(out)`` may fill and return the given C-contiguous uint8 scratch buffer (at least ``nbytes`` long) instead of
    allocating; readers that cannot are free to ignore it.
    """

    shape: tuple[int, ...]
    dtype: str
    load: Callable[[Array | None], Array]

    def read(self, out: Array | None = None) -> Array:
        """Read the tensor in its storage dtype; ``out`` is an optional uint8 scratch buffer to read into."""
        return self.load(out)

    @property
    def nbytes(self) -> int:
        """Size in bytes as stored."""
        return prod(self.shape) * ITEMSIZE[self.dtype]

    @property
    def T(self) -> Leaf:  # noqa: N802 - the field's name for a transpose
        """Lazy transpose of a 2-D tensor (a view of what is read)."""
        return Leaf(self.shape[::-1], self.dtype, lambda out: self.load(out).T)

    def rows(self, start: int, stop: int) -> Leaf:
        """Lazy part: rows start .. stop of the first axis, read alone where the container allows."""
        part = getattr(self.load, "rows", None)
        load = part(start, stop) if part is not None else lambda out: self.load(out)[start:stop]
        return Leaf((stop - start, *self.shape[1:]), self.dtype, load)

    def reshape(self, shape: tuple[int, ...]) -> Leaf:
        """Lazy reshape, row-major."""
        return Leaf(shape, self.dtype, lambda out: self.load(out).reshape(shape))
