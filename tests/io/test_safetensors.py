from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from loratools.errors import FileError, FormatError, UnsupportedError, UsageError
from loratools.io.dtypes import CODES, numpy_dtype
from loratools.io.read import open_bundle, peek
from loratools.io.source import mapped
from loratools.leaf import ITEMSIZE


@pytest.mark.parametrize("dtype", CODES)
def test_every_dtype_is_read_as_the_bytes_say(dtype: str, raw_file: Any) -> None:
    data = bytes(range(1, 1 + 6 * ITEMSIZE[dtype]))
    path = raw_file({"t": {"dtype": CODES[dtype], "shape": [2, 3], "data_offsets": [0, len(data)]}}, data)
    leaf = open_bundle(path).tensors["t"]
    array = leaf.read()
    assert (leaf.dtype, leaf.shape, leaf.nbytes) == (dtype, (2, 3), len(data))
    assert array.dtype == numpy_dtype(dtype) and array.dtype.name == dtype
    assert array.shape == (2, 3) and array.tobytes() == data


def test_values_are_those_the_official_package_wrote(adapter: Path, tensors: dict[str, Any]) -> None:
    for name, leaf in open_bundle(adapter).tensors.items():
        np.testing.assert_array_equal(leaf.read(), tensors[name])


def test_bf16_values(tmp_path: Path) -> None:
    values = np.array([1.5, -2.0, 3.0e38], ml_dtypes.bfloat16)
    save_file({"t": values}, tmp_path / "t")
    np.testing.assert_array_equal(open_bundle(tmp_path / "t").tensors["t"].read(), values)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=st.lists(st.integers(0, 5), max_size=4), shift=st.integers(0, 3))
def test_shapes_offsets_and_scratch_buffers(shape: list[int], shift: int, tmp_path: Path) -> None:
    values = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    save_file({"a": np.arange(shift, dtype=np.float64), "t": values}, tmp_path / "t")
    leaf = open_bundle(tmp_path / "t").tensors["t"]
    buffer = np.full(leaf.nbytes + 7, 255, np.uint8)
    read = leaf.read(buffer)
    np.testing.assert_array_equal(read, values)
    assert read.shape == tuple(shape)
    assert read.size == 0 or np.shares_memory(read, buffer)
    assert (buffer[leaf.nbytes :] == 255).all()


@pytest.mark.parametrize("buffer", [np.empty(47, np.uint8), np.empty(48, np.int8), np.empty(96, np.uint8)[::2]])
def test_scratch_buffer_that_does_not_fit(adapter: Path, buffer: Any) -> None:
    leaf = open_bundle(adapter).tensors["m.q.lora_A.weight"]
    with pytest.raises(UsageError, match="scratch"):
        leaf.read(buffer)


def test_fresh_arrays_are_writable_and_independent(adapter: Path) -> None:
    leaf = open_bundle(adapter).tensors["m.q.lora_A.weight"]
    one, two = leaf.read(), leaf.read()
    one[:] = -1
    assert not np.shares_memory(one, two) and (two >= 0).all()


def test_mapped_views_are_read_only_and_equal(adapter: Path, tensors: dict[str, Any]) -> None:
    bundle = open_bundle(adapter, mapped=True)
    for name, leaf in bundle.tensors.items():
        array = leaf.read()
        np.testing.assert_array_equal(array, tensors[name])
        assert not array.flags.writeable and not array.flags.owndata
    plain = open_bundle(adapter).tensors["m.q.lora_A.weight"]
    assert not mapped(plain).read().flags.writeable
    assert mapped(plain.T) is not None and mapped(plain.T).read().shape == (4, 3)


def test_reading_from_many_threads(tmp_path: Path) -> None:
    wanted = {f"t{i}": np.full((50, 50), i, np.int32) for i in range(40)}
    save_file(wanted, tmp_path / "t")
    bundle = open_bundle(tmp_path / "t")
    wrong: list[str] = []

    def work() -> None:
        wrong.extend(n for n, leaf in bundle.tensors.items() if not (leaf.read() == wanted[n]).all())

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_short_reads_are_continued(adapter: Path, tensors: dict[str, Any], monkeypatch: Any) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, bufs, at: real(fd, [bufs[0][:5]], at))
    for name, leaf in open_bundle(adapter).tensors.items():
        np.testing.assert_array_equal(leaf.read(), tensors[name])


def test_systems_without_preadv(adapter: Path, tensors: dict[str, Any], monkeypatch: Any) -> None:
    monkeypatch.delattr(os, "preadv")
    for name, leaf in open_bundle(adapter).tensors.items():
        np.testing.assert_array_equal(leaf.read(), tensors[name])


def test_order_is_that_of_the_bytes_not_of_the_header(raw_file: Any) -> None:
    info = {"dtype": "U8", "shape": [1]}
    path = raw_file({"a": {**info, "data_offsets": [1, 2]}, "b": {**info, "data_offsets": [0, 1]}}, b"xy")
    assert list(open_bundle(path).tensors) == ["b", "a"]
    assert open_bundle(path).tensors["a"].read().tobytes() == b"y"


def test_peek_reads_the_header_only(adapter: Path) -> None:
    header = peek(adapter / "adapter_model.safetensors")
    assert header.shapes == {"m.q.lora_A.weight": (3, 4), "m.q.lora_B.weight": (5, 3)}
    assert header.dtypes == {"m.q.lora_A.weight": "float32", "m.q.lora_B.weight": "float16"}
    assert header.metadata == {"format": "pt"}


def test_a_file_without_tensors_or_with_null_metadata(raw_file: Any) -> None:
    assert dict(peek(raw_file({})).entries) == {}
    assert peek(raw_file({"__metadata__": None})).metadata == {}


@pytest.mark.parametrize("change", ["shrunk", "replaced"])
def test_a_file_that_changes_before_the_first_read(adapter: Path, change: str) -> None:
    path = adapter / "adapter_model.safetensors"
    leaf = open_bundle(adapter).tensors["m.q.lora_B.weight"]
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-4] if change == "shrunk" else data)
    with pytest.raises(FileError, match="changed since") as caught:
        leaf.read()
    assert str(path) in str(caught.value)


def test_a_file_that_shrinks_while_it_is_read(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    leaf = open_bundle(adapter).tensors["m.q.lora_B.weight"]
    leaf.read()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 4)
    with pytest.raises(FileError, match="shorter"):
        leaf.read()


def test_read_error_of_the_system_names_the_file(adapter: Path, monkeypatch: Any) -> None:
    import errno

    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    leaf = open_bundle(adapter).tensors["m.q.lora_A.weight"]
    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(FileError, match="Input/output") as caught:
        leaf.read()
    assert caught.value.errno == errno.EIO and "adapter_model.safetensors" in str(caught.value)


def test_descriptor_is_closed_with_the_last_leaf(adapter: Path) -> None:
    import gc

    leaf = open_bundle(adapter).tensors["m.q.lora_A.weight"]
    leaf.read()
    fd = leaf.load.source._fd  # type: ignore[attr-defined]
    os.fstat(fd)
    del leaf
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
TWICE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
BROKEN: dict[str, tuple[Any, bytes, int | None, str]] = {
    "cut short": ({"a": ONE}, b"123", None, "truncated"),
    "header longer than the file": ({"a": ONE}, b"1234", 10**6, "ends inside its header"),
    "header length too short": ({"a": ONE}, b"1234", 5, "invalid header"),
    "header bomb": ({"a": ONE}, b"1234", 2**40, "too large"),
    "header bomb of all bits": ({"a": ONE}, b"1234", 2**64 - 1, "too large"),
    "something appended": ({"a": ONE}, b"12345678", None, "longer than its header"),
    "overlap": ({"a": ONE, "b": {**ONE, "data_offsets": [2, 6]}}, b"123456", None, "tensor 'b' overlap"),
    "gap": ({"a": ONE, "b": {**ONE, "data_offsets": [8, 12]}}, b"1" * 12, None, "leave a gap"),
    "ends before it begins": ({"a": {**ONE, "data_offsets": [4, 0]}}, b"1234", None, "end before they begin"),
    "out of range": ({"a": {**ONE, "shape": [9], "data_offsets": [0, 36]}}, b"1234", None, "truncated"),
    "shape and bytes differ": ({"a": {**ONE, "shape": [2]}}, b"1234", None, "tensor 'a': dtype F32, shape"),
    "overflow": ({"a": {**ONE, "shape": [2**40, 2**40], "data_offsets": [0, 0]}}, b"", None, "overflow"),
    "negative size": ({"a": {**ONE, "shape": [-1]}}, b"1234", None, "invalid header"),
    "unknown dtype": ({"a": {**ONE, "dtype": "F99"}}, b"1234", None, "tensor 'a' has an unknown dtype"),
    "half a byte per element": ({"a": {**ONE, "dtype": "F4", "shape": [8]}}, b"1234", None, "tensor 'a' is not supp"),
    "invalid JSON": (b'{"a": ', b"", None, "invalid header"),
    "no object for a tensor": ({"a": 1}, b"", None, "invalid header"),
    "invalid UTF-8": (b'{"\xff":1}', b"", None, "UTF-8"),
    "metadata that is not text": ({"__metadata__": {"x": 1}}, b"", None, "expected a string"),
    "deep nesting": (b'{"a":' + b"[" * 5000, b"", None, "invalid header"),
    "duplicate tensor": (TWICE, b"1234", None, "'a'"),
    "duplicate metadata": (b'{"__metadata__":{"x":"1","x":"2"}}', b"", None, "'x'"),
    "duplicate metadata block": (b'{"__metadata__":{"x":"1"},"__metadata__":{"y":"2"}}', b"", None, ""),
    "hostile dtype": ({"a": {"dtype": "` not fully covered", "shape": 3}}, b"", None, ""),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_with_what_to_do(case: str, raw_file: Any) -> None:
    header, data, length, text = BROKEN[case]
    path = raw_file(header, data, length)
    with pytest.raises(FormatError) as caught:
        open_bundle(path)
    assert text in str(caught.value)
    assert str(path) in str(caught.value)
    assert caught.value.got is not None
    with pytest.raises(FormatError):
        peek(path)


def test_sizes_of_a_truncated_file_are_told(raw_file: Any) -> None:
    path = raw_file({"a": ONE}, b"123")
    with pytest.raises(FormatError) as caught:
        open_bundle(path)
    assert caught.value.expected == f"{path.stat().st_size + 1} bytes"
    assert caught.value.got == f"{path.stat().st_size} bytes"
    assert "download" in (caught.value.hint or "")


def test_sub_byte_dtypes_are_named_as_unsupported(raw_file: Any) -> None:
    with pytest.raises(UnsupportedError, match="'a'"):
        peek(raw_file({"a": {**ONE, "dtype": "F4", "shape": [8]}}, b"1234"))
