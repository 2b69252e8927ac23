"""The only place that names an array library: which one holds an array, and every conversion between dtypes.

All other numerics are written once against the array API (``xp = namespace(x)``). Arithmetic never happens in a
storage dtype: it starts with :func:`up` and ends with :func:`down`. torch is looked up among the loaded modules, never
imported, except where :func:`to_device` is asked for a device that only torch has.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Any

import numpy as np

from loratools.errors import MissingExtraError, NumericsError, UsageError
from loratools.leaf import ITEMSIZE, Array, Leaf
from loratools.linalg.short_floats import to_float16, widened

_FLOATS = frozenset(name for name in ITEMSIZE if name.startswith(("float", "bfloat")))
_INFINITY = {"float16": 0x7C00, "bfloat16": 0x7F80}  # as bits
_COMPUTE = ("float32", "float64")
_scratch = threading.local()


def _torch(*arrays: Array) -> Any:
    """Return the torch module if one of the arrays is a tensor, else None."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and any(isinstance(x, torch.Tensor) for x in arrays) else None


def namespace(*arrays: Array) -> Any:
    """Return the array API namespace of the arrays: NumPy itself, or array-api-compat's torch.

    Python numbers and NumPy scalars are ignored; arrays of both libraries at once are a :class:`UsageError`.
    """
    if _torch(*arrays) is None:
        return np
    if any(isinstance(x, np.ndarray) for x in arrays):
        raise UsageError("arrays of two libraries in one call", expected="all NumPy or all torch")
    import array_api_compat.torch as xp

    return xp


def dtype_name(x: Leaf | Array) -> str:
    """Return the name of the element type, the same for NumPy, ml_dtypes, torch and leaves: ``bfloat16``, ``int8`` …"""
    if isinstance(x, Leaf):
        return x.dtype
    return _name(x.dtype)


@cache
def _name(dtype: Any) -> str:
    return str(getattr(dtype, "name", dtype)).removeprefix("torch.")  # torch dtypes have no name


def is_float(name: str) -> bool:
    """Tell whether a dtype name is a real floating-point type (8-bit ones included)."""
    return name in _FLOATS


def working_dtype(*arrays: Leaf | Array) -> str:
    """Return the dtype to compute in: fp64 if one of the arrays is fp64, else fp32."""
    return "float64" if "float64" in map(dtype_name, arrays) else "float32"


def device_of(x: Leaf | Array) -> str:
    """Return ``cpu`` for NumPy arrays and leaves, torch's own word (``cuda:0``) for tensors."""
    return "cpu" if isinstance(x, Leaf) or _torch(x) is None else str(x.device)


def up(x: Leaf | Array, dtype: str = "float32") -> Array:
    """Return ``x`` in fp32 or fp64, exactly (fp64 -> fp32 rounds), in its own library and on its own device.

    A leaf is read first, through a buffer that each thread keeps; the result never aliases that buffer. An array that
    has the dtype already is returned as it is. Transposed views keep their strides. Cost: 1 ms per million fp16
    values on NumPy. Raises UsageError for another target dtype.
    """
    if dtype not in _COMPUTE:
        raise UsageError("arithmetic happens in fp32 or fp64 only", expected=" or ".join(_COMPUTE), got=dtype)
    if isinstance(x, Leaf):
        x = x.read() if x.dtype == dtype else x.read(_buffer(x.nbytes))
    torch = _torch(x)
    if torch is not None:
        return x.to(getattr(torch, dtype))
    if dtype_name(x) == dtype:
        return x
    x = widened(x, dtype_name(x))
    if dtype_name(x) == dtype:
        return x
    with overflow_checked():  # NumPy warns of some NaN patterns
        return x.astype(dtype)


def _buffer(nbytes: int) -> Array:
    """Return this thread's scratch buffer, grown to at least ``nbytes``."""
    kept = getattr(_scratch, "kept", None)
    if kept is None or kept.nbytes < nbytes:
        kept = _scratch.kept = np.empty(nbytes, np.uint8)
    return kept


def _finite_bits(x: Array, infinity: int) -> bool:
    """Tell whether 16-bit floats are all finite: as integers, infinity and NaN are the largest of their sign."""
    return x.size == 0 or bool(x.view(np.int16).max() < infinity and x.view(np.uint16).max() < 0x8000 + infinity)


def down(x: Array, dtype: str) -> Array:
    """Return ``x`` in the storage dtype ``dtype``, rounded to nearest even.

    fp64 passes through fp32 on its way to a narrower float. Integers round to nearest even too. Raises NumericsError
    where a finite value does not fit, UsageError for an unknown dtype.
    """
    if dtype not in ITEMSIZE:
        raise UsageError("unknown dtype", expected=", ".join(ITEMSIZE), got=dtype)
    if dtype_name(x) == dtype:
        return x
    if is_float(dtype):
        return _down_float(x, dtype)
    return _down_integer(x, dtype)


def down_together(xs: Sequence[Array], dtypes: Sequence[str]) -> list[Array] | None:
    """Return :func:`down` of many tensors on a GPU, which is asked once whether all are finite; None if one is not.

    ``down`` asks once per tensor, and every question waits for the device. Tensors of torch only.
    """
    torch = _torch(*xs)
    made = [x.to(getattr(torch, dtype)) for x, dtype in zip(xs, dtypes, strict=True)]
    largest = torch.stack([x.float() for x in torch._foreach_norm(made, float("inf"))])
    return made if bool(torch.isfinite(largest).all()) else None


def _down_float(x: Array, dtype: str) -> Array:
    narrow = x if dtype == "float64" or dtype_name(x) != "float64" else cast(x, "float32")
    result = cast(narrow, dtype)
    if not all_finite(result):
        xp = namespace(x)
        if bool(xp.any(xp.isfinite(up(x, "float64")) & ~xp.isfinite(up(result)))):
            raise NumericsError(f"a value is too large for {dtype}", got=float(xp.max(xp.abs(up(x, "float64")))))
    return result


def _down_integer(x: Array, dtype: str) -> Array:
    xp = namespace(x)
    whole = xp.round(x) if is_float(dtype_name(x)) else x
    result = cast(whole, dtype)
    if not bool(xp.all(cast(result, "float64") == cast(whole, "float64"))):
        raise NumericsError(f"a value does not fit {dtype}")
    return result


def cast(x: Array, dtype: str) -> Array:
    """Return ``x`` in the named dtype by the library's own conversion, unchecked: for values known to fit."""
    torch = _torch(x)
    if torch is not None:
        if (
            dtype == "float8_e4m3fn"
        ):  # torch clips to 448 in silence; what rounds beyond becomes NaN, as everywhere else
            x = torch.where(x.abs() <= 464, x, torch.nan)
        return x.to(getattr(torch, dtype))
    if dtype == "float16" and x.dtype == np.float32 and x.ndim:
        return to_float16(x)
    with overflow_checked():
        return x.astype(numpy_dtype(dtype), copy=False)


@cache
def numpy_dtype(name: str) -> Any:
    """Return the NumPy dtype of a name; the ones NumPy lacks come from ml_dtypes, imported when first needed."""
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))


def to_numpy(x: Leaf | Array) -> Array:
    """Return ``x`` as a NumPy array of the same dtype (bf16 and fp8 as ml_dtypes), without a copy where possible."""
    x = x.read() if isinstance(x, Leaf) else x
    torch = _torch(x)
    if torch is None:
        return np.asarray(x)
    x = x.detach().cpu()
    name = dtype_name(x)
    if hasattr(np, name):
        return x.numpy()
    return x.contiguous().view(torch.uint8 if ITEMSIZE[name] == 1 else torch.int16).numpy().view(numpy_dtype(name))


def to_device(x: Leaf | Array, device: str) -> Array:
    """Return ``x`` on ``device``: NumPy arrays stay NumPy on ``cpu``; any other device turns them into torch tensors.

    Raises MissingExtraError where torch is needed and not installed, UsageError for a device that torch does not have.
    """
    x = x.read() if isinstance(x, Leaf) else x
    if _torch(x) is None and device == "cpu":
        return x
    try:
        return (x if _torch(x) is not None else _to_torch(x)).to(device)
    except (RuntimeError, AssertionError) as error:  # torch's words for a device that is not there
        raise UsageError("torch cannot use this device", got=device, hint="use cpu, or a torch built for it") from error


def placed_like(x: Leaf | Array, like: Array) -> Array:
    """Return ``x`` in the library and on the device of ``like``."""
    x = x.read() if isinstance(x, Leaf) else x
    if _torch(like) is None:
        return to_numpy(x)
    return (x if _torch(x) is not None else _to_torch(x)).to(like.device)


def _to_torch(x: Array) -> Array:
    """Return a torch CPU tensor with the values and dtype of a NumPy array (copied, so read-only pages are safe)."""
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError("torch is not installed", hint="pip install 'loratools[torch]'") from error
    name, copy = dtype_name(x), np.array(x, order="C")
    if hasattr(np, name):
        return torch.from_numpy(copy)
    bits = copy.view(np.uint8 if copy.itemsize == 1 else np.int16)
    return torch.from_numpy(bits).view(getattr(torch, name))


def raw_bytes(x: Leaf | Array) -> Any:
    """Return a memoryview of the elements as bytes, little-endian, row-major: what a safetensors file holds."""
    x = np.ascontiguousarray(to_numpy(x)).reshape(-1)
    if x.dtype.byteorder == ">":
        x = x.astype(x.dtype.newbyteorder("<"))
    return x.view(np.uint8).data


def all_finite(x: Array) -> bool:
    """Tell whether no element is infinite or NaN; one cheap pass in the storage dtype. Integers are always finite."""
    if not is_float(dtype_name(x)):
        return True
    torch = _torch(x)
    if torch is not None:
        return bool(torch.isfinite(x if x.element_size() > 1 else x.to(torch.float32)).all())
    if x.dtype.itemsize == 2 and x.ndim and x.dtype.isnative:
        return _finite_bits(x, _INFINITY[dtype_name(x)])
    if x.dtype.itemsize >= 4:
        with overflow_checked():
            if np.isfinite(x.sum()):  # an overflowing sum decides nothing; a finite one does
                return True
    return bool(np.isfinite(x).all())


def overflow_checked() -> Any:
    """Return a context in which NumPy does not warn of overflow, because the caller checks the result."""
    return np.errstate(over="ignore", invalid="ignore")


def cholesky(x: Array) -> Array | None:
    """Return the lower Cholesky factor of ``x (..., r, r)``, or None where it is not positive definite."""
    torch = _torch(x)
    if torch is not None:
        factor, info = torch.linalg.cholesky_ex(x)
        return None if bool((info != 0).any()) else factor
    try:
        return np.linalg.cholesky(x)
    except np.linalg.LinAlgError:
        return None


def solve_triangular(l: Array, y: Array, *, lower: bool, transpose: bool = False) -> Array:  # noqa: E741
    """Solve ``L X = Y`` (``L^T X = Y`` with ``transpose``): l (..., r, r), y (..., r, k) -> X (..., r, k).

    Only the named triangle of ``l`` is read. Cost r^2 k multiply-adds (on NumPy twice that below r = 256, where SciPy
    would take longer to import).
    """
    torch = _torch(l, y)
    if torch is not None:
        return torch.linalg.solve_triangular(l.mT if transpose else l, y, upper=lower == transpose)
    if l.ndim == 2 and l.shape[-1] > 256:
        from scipy.linalg import solve_triangular as solve

        return solve(l, y, lower=lower, trans=int(transpose), check_finite=False)
    triangle = np.tril(l) if lower else np.triu(l)
    return np.linalg.solve(triangle.mT if transpose else triangle, y)


def topk_threshold(x: Array, k: int) -> Array:
    """Return the ``k``-th largest ``|x|`` as a 0-d array: ``abs(x) >= it`` keeps at least k elements.

    Expected cost linear in the size. Raises UsageError unless 1 <= k <= size.
    """
    size = prod(x.shape)
    if not 1 <= k <= size:
        raise UsageError("k lies outside the array", expected=f"1 to {size}", got=k)
    torch = _torch(x)
    if torch is not None:
        return torch.kthvalue(x.abs().reshape(-1), size - k + 1).values
    return np.partition(np.abs(x).reshape(-1), size - k)[size - k]


def scatter_add(size: int, index: Array, values: Array) -> Array:
    """Return (size,) zeros with ``values (c,)`` added at ``index (c,)``, summed in fp64, in the dtype of ``values``.

    Repeated indices add up. Raises UsageError for an index outside 0 .. size-1.
    """
    xp = namespace(index, values)
    if prod(index.shape) and (int(xp.min(index)) < 0 or int(xp.max(index)) >= size):
        raise UsageError("an index lies outside the array", expected=f"0 to {size - 1}")
    torch = _torch(values)
    if torch is not None:
        zeros = torch.zeros(size, dtype=torch.float64, device=values.device)
        return zeros.index_add_(0, index.long(), values.double()).to(values.dtype)
    return np.bincount(index, weights=values, minlength=size).astype(values.dtype)


def unpack_bits(codes: Array, bits: int, count: int) -> Array:
    """Unpack ``count`` unsigned integers of ``bits`` (1 to 8) each from bytes: codes uint8 (c,) -> uint8 (count,).

    Little end first: value i occupies bits ``i * bits`` onwards, counted from the lowest bit of the first byte.
    Raises UsageError where the bytes are too few.
    """
    if not 1 <= bits <= 8 or bits * count > 8 * codes.shape[0]:
        raise UsageError("packed bytes too short", expected=f"{count} values of {bits} bits", got=8 * codes.shape[0])
    xp = namespace(codes)
    place = _like(codes, range(8))
    each = (codes[:, None] >> place) & 1
    each = xp.reshape(xp.reshape(each, (-1,))[: bits * count], (count, bits))
    return xp.sum(each << place[:bits], axis=1, dtype=xp.uint8)


def _like(x: Array, values: Any) -> Array:
    """Return ``values`` as a 1-D array in the library and dtype and on the device of ``x``."""
    torch = _torch(x)
    if torch is not None:
        return torch.tensor(list(values), dtype=x.dtype, device=x.device)
    return np.array(list(values), dtype=x.dtype)


def fft(x: Array, axis: int = -1) -> Array:
    """Return the discrete Fourier transform along ``axis`` (complex, of matching width)."""
    return namespace(x).fft.fft(x, axis=axis)


def ifft(x: Array, axis: int = -1) -> Array:
    """Return the inverse discrete Fourier transform along ``axis``, scaled by 1/n."""
    return namespace(x).fft.ifft(x, axis=axis)
