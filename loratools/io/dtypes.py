"""Storage dtypes: their names in files, in NumPy and in torch, and arrays as bytes.

The names are those of :data:`loratools.leaf.ITEMSIZE`. bf16 and fp8 come from ``ml_dtypes``, imported when first met.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from loratools.errors import FormatError
from loratools.leaf import ITEMSIZE, Array

CODES = {
    "uint64": "U64", "int64": "I64", "float64": "F64", "complex64": "C64", "float32": "F32", "uint32": "U32",
    "int32": "I32", "bfloat16": "BF16", "float16": "F16", "uint16": "U16", "int16": "I16",
    "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""dtype name -> safetensors code, in the order in which the official serializer stores them."""

NAMES = {code: name for name, code in CODES.items()}
"""safetensors code -> dtype name."""

_NUMPY = frozenset(name for name in CODES if name != "bfloat16" and not name.startswith("float8"))
_CARRIERS = {1: "uint8", 2: "int16"}  # what torch and NumPy both have, for dtypes that only torch has


@functools.cache
def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the NumPy dtype of a name in :data:`CODES`."""
    if name in _NUMPY:
        return np.dtype(name)
    import ml_dtypes

    dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
    return dtype


def dtype_name(array: Array) -> str:
    """Return the dtype name of a NumPy array or torch tensor; FormatError if it cannot be stored."""
    dtype = getattr(array, "dtype", type(array).__name__)
    name = str(getattr(dtype, "name", dtype)).removeprefix("torch.")
    if name not in ITEMSIZE:
        raise FormatError("a tensor has a dtype that no adapter file holds", expected=", ".join(ITEMSIZE), got=name)
    return name


def to_numpy(array: Array) -> np.ndarray[Any, Any]:
    """Return a NumPy array of the same dtype; CPU torch tensors share their memory, others are copied."""
    if not hasattr(array, "detach"):
        return np.asarray(array)
    name = dtype_name(array)
    tensor = array.detach().cpu().contiguous().resolve_conj().resolve_neg()
    if name in _NUMPY:
        return np.asarray(tensor.numpy())
    import torch

    carrier = getattr(torch, _CARRIERS[ITEMSIZE[name]])
    return np.asarray(tensor.view(carrier).numpy().view(numpy_dtype(name)))


def as_bytes(array: np.ndarray[Any, Any]) -> memoryview:
    """Return the elements in row-major order as bytes, without a copy where the array is contiguous already."""
    native = array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    return np.ascontiguousarray(native).reshape(-1).view(np.uint8).data


def frozen(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return a read-only view."""
    view = array.view()
    view.flags.writeable = False
    return view


def from_raw(raw: bytes, dtype: str, shape: tuple[int, ...]) -> Array:
    """Return the array that little-endian row-major bytes stand for."""
    return np.frombuffer(raw, numpy_dtype(dtype)).reshape(shape)
