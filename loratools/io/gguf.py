"""The GGUF container, through the official ``gguf`` package (extra ``gguf``).

Key-values become metadata text; the types of those that are no strings are kept under :data:`TYPES`, so that a file is
written with the types it was read with.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loratools.errors import FormatError, MissingExtraError, UnsupportedError
from loratools.io.atomic import replacing
from loratools.io.dtypes import dtype_name as stored_dtype
from loratools.io.dtypes import numpy_dtype, to_numpy
from loratools.io.oserrors import os_errors
from loratools.io.output import check_output
from loratools.leaf import Array, Leaf

TYPES = "loratools.gguf.types"
DEQUANTISED = "loratools.gguf.dequantised"
MAX_NAME = 63  # bytes; llama.cpp's GGML_MAX_NAME counts the final zero
_PLAIN = ("float16", "float32", "float64", "int8", "int16", "int32", "int64")
_DAMAGE = (ValueError, LookupError, TypeError, ArithmeticError, MemoryError, AttributeError)


def read_gguf(path: Path) -> tuple[dict[str, Leaf], dict[str, str]]:
    """Return a leaf per tensor (numpy order of axes) and the key-values as text.

    Quantised tensors are dequantised to fp32 when read, and named under :data:`DEQUANTISED`. Raises MissingExtraError
    without the package, FormatError for a damaged file, UnsupportedError for a big-endian one.
    """
    gguf = _import()
    try:
        with os_errors("read the file", path):
            reader = gguf.GGUFReader(path)
        if reader.endianess != gguf.GGUFEndian.LITTLE:
            raise UnsupportedError("a big-endian GGUF file", hint="convert it with gguf-convert-endian")
        metadata = _metadata(gguf, reader)
        tensors = {t.name: _leaf(gguf, t) for t in reader.tensors}
    except _DAMAGE as error:
        if isinstance(error, FormatError):
            raise error.at(file=path) from None
        raise FormatError("the GGUF file is damaged or cut short", file=path, got=str(error)[:200]) from None
    quantised = [t.name for t in reader.tensors if t.tensor_type.name not in _GGML]
    return tensors, metadata | ({DEQUANTISED: json.dumps(quantised)} if quantised else {})


_GGML = {
    "F16": "float16", "F32": "float32", "F64": "float64", "BF16": "bfloat16",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
}  # fmt: skip


def _import() -> Any:
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("GGUF files need the gguf package", hint="pip install 'loratools[gguf]'") from None
    return gguf


def _metadata(gguf: Any, reader: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    types: dict[str, list[str]] = {}
    for name, field in reader.fields.items():
        if name.startswith("GGUF."):
            continue
        value = field.contents()
        if isinstance(value, str):
            found[name] = value
        else:
            found[name] = json.dumps(value)
            types[name] = [t.name for t in field.types]
    return found | ({TYPES: json.dumps(types, sort_keys=True)} if types else {})


def _leaf(gguf: Any, tensor: Any) -> Leaf:
    shape = tuple(int(n) for n in reversed(tensor.shape.tolist()))
    dtype = _GGML.get(tensor.tensor_type.name)
    if dtype is None:
        return Leaf(
            shape, "float32", lambda out: gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        )
    if dtype == "bfloat16":
        return Leaf(shape, dtype, lambda out: np.array(tensor.data).view(numpy_dtype(dtype)).reshape(shape))
    return Leaf(shape, dtype, lambda out: np.array(tensor.data).reshape(shape))


def write_gguf(
    path: Path,
    tensors: Mapping[str, Leaf | Array],
    metadata: Mapping[str, str],
    *,
    overwrite: bool = False,
    inputs: Sequence[Path] = (),
) -> Path:
    """Write a GGUF file, complete or not at all; one tensor in memory at a time.

    ``metadata`` must hold ``general.architecture``. Raises FormatError for names that llama.cpp cannot hold.
    """
    gguf = _import()
    check_output(path, inputs, overwrite)
    long = [name for name in tensors if len(name.encode()) > MAX_NAME]
    if long:
        raise FormatError(f"{len(long)} tensor names are too long for GGUF", expected=f"{MAX_NAME} bytes", got=long[0])
    writer = gguf.GGUFWriter(None, metadata["general.architecture"])
    _add_metadata(gguf, writer, metadata)
    for name, tensor in tensors.items():
        _announce(gguf, writer, name, tensor)
    with replacing(path, overwrite=overwrite) as fd:
        writer.fout = [os.fdopen(os.dup(fd), "wb")]
        writer.state = gguf.gguf_writer.WriterState.EMPTY
        with os_errors("write the output", path):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in tensors.values():
                writer.write_tensor_data(_raw(tensor))
            writer.close()
    return path


def _add_metadata(gguf: Any, writer: Any, metadata: Mapping[str, str]) -> None:
    types = json.loads(metadata.get(TYPES, "{}"))
    kinds = gguf.GGUFValueType
    for key, text in sorted(metadata.items()):
        if key in (TYPES, DEQUANTISED, "general.architecture"):
            continue
        if key not in types:
            writer.add_key_value(key, text, kinds.STRING)
            continue
        first, *rest = types[key]
        writer.add_key_value(key, json.loads(text), kinds[first], kinds[rest[-1]] if rest else None)


def _announce(gguf: Any, writer: Any, name: str, tensor: Leaf | Array) -> None:
    dtype = tensor.dtype if isinstance(tensor, Leaf) else stored_dtype(tensor)
    shape = tuple(int(n) for n in tensor.shape)
    if dtype in _PLAIN:
        writer.add_tensor_info(name, shape, np.dtype(dtype), int(tensor.nbytes))
    elif dtype == "bfloat16":
        raw = (*shape[:-1], 2 * shape[-1])
        writer.add_tensor_info(name, raw, np.dtype("uint8"), int(tensor.nbytes), gguf.GGMLQuantizationType.BF16)
    else:
        raise FormatError(
            "GGUF adapters hold no tensors of this dtype", parameter=name, got=dtype, hint="--dtype float16"
        )


def _raw(tensor: Leaf | Array) -> Array:
    x = np.ascontiguousarray(to_numpy(tensor.read() if isinstance(tensor, Leaf) else tensor))
    return x if x.dtype.name in _PLAIN else x.reshape(-1).view(np.uint8)
