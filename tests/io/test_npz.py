from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from loratools.errors import FormatError, UsageError
from loratools.io import zips
from loratools.io.read import open_bundle


def _npy(array: Any) -> bytes:
    held = io.BytesIO()
    np.save(held, array, allow_pickle=True)
    return held.getvalue()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_in_their_order(save: Any, tmp_path: Path) -> None:
    wanted = {
        "b.lora_a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.array(2.5),
        "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "foreign": np.arange(3, dtype=">f4"),
        "none": np.zeros((0, 4), np.int8),
    }
    save(tmp_path / "a.npz", **wanted)
    bundle = open_bundle(tmp_path / "a.npz")
    assert bundle.container == "npz" and list(bundle.tensors) == list(wanted)
    for name, leaf in bundle.tensors.items():
        array = leaf.read()
        np.testing.assert_array_equal(array, wanted[name])
        assert array.dtype == np.dtype(leaf.dtype) and array.dtype.isnative
        assert array.shape == leaf.shape == wanted[name].shape


def test_bf16(tmp_path: Path) -> None:
    values = np.array([[1.5, -3.0]], ml_dtypes.bfloat16)
    np.savez(tmp_path / "a.npz", t=values)
    leaf = open_bundle(tmp_path / "a.npz").tensors["t"]
    assert leaf.dtype == "bfloat16"
    np.testing.assert_array_equal(leaf.read(), values)


def test_scratch_buffer(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", t=np.arange(4.0))
    leaf, buffer = open_bundle(tmp_path / "a.npz").tensors["t"], np.empty(40, np.uint8)
    assert np.shares_memory(leaf.read(buffer), buffer)
    with pytest.raises(UsageError):
        leaf.read(buffer[:31])


def test_object_arrays_are_refused_and_not_unpickled(zip_of: Any) -> None:
    path = zip_of({"evil.npy": _npy(np.array([{"a": 1}], dtype=object))})
    with pytest.raises(FormatError, match="nothing was executed") as caught:
        open_bundle(path)
    assert "evil" in str(caught.value) and str(path) in str(caught.value)


def test_a_bomb_is_refused_by_its_declared_size(zip_of: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(zips, "_FREE_BYTES", 1000)
    path = zip_of({"t.npy": _npy(np.zeros(2_000_000))})
    assert path.stat().st_size < 100_000
    with pytest.raises(FormatError, match="nothing was unpacked"):
        open_bundle(path)


def _header(text: str) -> bytes:
    body = text.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body


NUMBERS = "'descr': '<f4', 'fortran_order': False"
BROKEN: dict[str, tuple[bytes, str]] = {
    "shorter than its shape": (_npy(np.zeros(9))[:-8], "not as long"),
    "huge shape": (_header(f"{{{NUMBERS}, 'shape': (1000000000000,)}}"), "not as long"),
    "negative shape": (_header(f"{{{NUMBERS}, 'shape': (-2, -2)}}") + bytes(16), "not as long"),
    "no header": (b"hello", "damaged"),
    "header that is code": (_header("__import__('os').getpid()"), "damaged"),
    "unknown version": (b"\x93NUMPY\x09\x00" + bytes(50), "damaged"),
    "text": (_npy(np.array(["abc"])), "dtype"),
    "record": (_npy(np.zeros(1, [("a", "f4")])), "dtype"),
    "extended precision": (_npy(np.zeros(1, np.longdouble)), "dtype"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_members_are_named(case: str, zip_of: Any) -> None:
    content, told = BROKEN[case]
    path = zip_of({"good.npy": _npy(np.zeros(1)), "bad.npy": content})
    with pytest.raises(FormatError) as caught:
        open_bundle(path)
    assert told in str(caught.value) and "bad" in str(caught.value) and str(path) in str(caught.value)


def test_damaged_content_is_found_when_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", t=np.zeros(1000))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[4000] ^= 255
    (tmp_path / "a.npz").write_bytes(data)
    leaf = open_bundle(tmp_path / "a.npz").tensors["t"]
    with pytest.raises(FormatError, match=r"'t\.npy'"):
        leaf.read()


def test_repeated_names_and_encryption(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("t.npy", _npy(np.zeros(1)))
        archive.writestr("t.npy", _npy(np.ones(1)))
    with pytest.raises(FormatError, match="twice"):
        open_bundle(path)
    np.savez(path, t=np.zeros(1))
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 8] |= 1  # the flag of the archive's directory
    path.write_bytes(data)
    with pytest.raises(FormatError, match="encrypted"):
        open_bundle(path)
