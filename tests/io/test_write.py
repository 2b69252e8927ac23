from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from loratools.errors import ExistsError, FileError, FormatError, MismatchError
from loratools.io.dtypes import CODES, numpy_dtype
from loratools.io.read import open_bundle, peek
from loratools.io.write import TensorPlan, write_safetensors, write_text
from loratools.leaf import ITEMSIZE

PLAN = [TensorPlan("a", "float32", (2,)), TensorPlan("b", "float32", (3,))]
A, B = np.ones(2, np.float32), np.zeros(3, np.float32)


def _plan(tensors: dict[str, Any]) -> list[TensorPlan]:
    return [TensorPlan(name, array.dtype.name, array.shape) for name, array in tensors.items()]


def _array(dtype: str, shape: tuple[int, ...], seed: int) -> Any:
    count = int(np.prod(shape)) * ITEMSIZE[dtype]
    raw = np.random.default_rng(seed).integers(0, 2 if dtype == "bool" else 256, count, np.uint8)
    return raw.view(numpy_dtype(dtype)).reshape(shape)


def _left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]


def test_bytes_of_the_official_serializer_in_every_dtype(tmp_path: Path) -> None:
    tensors = {f"{i % 3}.{dtype}": _array(dtype, (2, i % 4, 3), i) for i, dtype in enumerate(CODES)}
    save_file(tensors, tmp_path / "official")
    write_safetensors(tmp_path / "ours", _plan(tensors), tensors.items())
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "official").read_bytes()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    held=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(CODES)), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    ),
    metadata=st.none()
    | st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])), st.text('aé\n"\\\x00\x1f\x7f\u2028😀'), max_size=1
    ),
    order=st.randoms(use_true_random=False),
)
def test_bytes_of_the_official_serializer(held: Any, metadata: Any, order: Any, tmp_path: Path) -> None:
    assume(held or metadata != {})  # there the official serializer writes invalid JSON
    tensors = {name: _array(dtype, tuple(shape), i) for i, (name, (dtype, shape)) in enumerate(held.items())}
    save_file(tensors, tmp_path / "official", metadata=metadata)
    chunks = list(tensors.items())
    order.shuffle(chunks)
    write_safetensors(tmp_path / "ours", _plan(tensors), chunks, metadata=metadata, overwrite=True)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "official").read_bytes()


def test_several_metadata_keys_are_sorted_and_the_rest_is_the_same(tmp_path: Path, tensors: Any) -> None:
    metadata = {key: key.upper() for key in ("z", "format", "a", "history")}
    save_file(tensors, tmp_path / "official", metadata=metadata)
    write_safetensors(tmp_path / "ours", _plan(tensors), tensors.items(), metadata=metadata)
    ours, official = peek(tmp_path / "ours"), peek(tmp_path / "official")
    assert list(ours.metadata) == sorted(metadata) and ours.metadata == official.metadata
    assert ours.entries == official.entries
    assert (tmp_path / "ours").stat().st_size == (tmp_path / "official").stat().st_size


def test_neither_tensors_nor_metadata(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", [], [], metadata={})
    assert (dict(peek(tmp_path / "x").entries), peek(tmp_path / "x").metadata) == ({}, {})


def test_layouts_in_memory_do_not_matter(tmp_path: Path) -> None:
    base = np.arange(12, dtype=np.float32).reshape(3, 4)
    tensors = {"t": base.T, "s": base[::2, ::-1], "foreign": base.astype(">f4"), "number": np.float32(3)}
    write_safetensors(tmp_path / "x", _plan(tensors), tensors.items())
    for name, leaf in open_bundle(tmp_path / "x").tensors.items():
        np.testing.assert_array_equal(leaf.read(), tensors[name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn", "int64", "bool", "complex64"])
def test_torch_tensors(dtype: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from safetensors.torch import save_file as save_torch

    tensor = torch.arange(12).reshape(3, 4).to(getattr(torch, dtype))
    save_torch({"t": tensor}, tmp_path / "official")
    grad = tensor.requires_grad_(dtype in ("float32", "bfloat16", "float16"))
    write_safetensors(tmp_path / "ours", [TensorPlan("t", dtype, (3, 4))], [("t", grad)])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "official").read_bytes()
    write_safetensors(tmp_path / "t", [TensorPlan("t", dtype, (4, 3))], [("t", tensor.T)])
    np.testing.assert_array_equal(
        open_bundle(tmp_path / "t").tensors["t"].read(), open_bundle(tmp_path / "ours").tensors["t"].read().T
    )


class Unlike(NamedTuple):
    chunks: list[tuple[str, Any]]
    told: str


UNLIKE = {
    "missing": Unlike([("a", A)], "did not come"),
    "not planned": Unlike([("a", A), ("b", B), ("c", A)], "c"),
    "twice": Unlike([("a", A), ("a", A)], "came twice"),
    "shape": Unlike([("a", A), ("b", A)], "(3,)"),
    "dtype": Unlike([("a", A.astype(np.float16))], "float16"),
    "number of dimensions": Unlike([("a", A[None])], "(1, 2)"),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_tensors_unlike_the_plan_leave_nothing(case: str, tmp_path: Path) -> None:
    with pytest.raises(MismatchError) as caught:
        write_safetensors(tmp_path / "x", PLAN, UNLIKE[case].chunks)
    assert UNLIKE[case].told in str(caught.value) and str(tmp_path / "x") in str(caught.value)
    assert list(tmp_path.iterdir()) == []


BAD_PLANS: dict[str, tuple[list[TensorPlan], Any]] = {
    "twice": ([PLAN[0], PLAN[0]], None),
    "dtype": ([TensorPlan("a", "float80", (1,))], None),
    "reserved name": ([TensorPlan("__metadata__", "float32", (1,))], None),
    "surrogate": ([TensorPlan("\ud800", "float32", (1,))], None),
    "metadata": (PLAN, {"a": 1}),
}


@pytest.mark.parametrize("case", BAD_PLANS)
def test_plans_that_no_file_can_hold(case: str, tmp_path: Path) -> None:
    plan, metadata = BAD_PLANS[case]

    def never() -> Iterator[tuple[str, Any]]:
        pytest.fail("work began")
        yield ("a", A)

    with pytest.raises((FormatError, MismatchError)):
        write_safetensors(tmp_path / "x", plan, never(), metadata=metadata)
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_an_error_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"old")
    chunks = iter([("a", A), ("b", B)])
    with pytest.raises(ExistsError, match="exists already"):
        write_safetensors(tmp_path / "x", PLAN, chunks)
    assert len(list(chunks)) == 2 and (tmp_path / "x").read_bytes() == b"old"
    assert write_safetensors(str(tmp_path / "x"), PLAN, [("a", A), ("b", B)], overwrite=True) == tmp_path / "x"
    assert list(open_bundle(tmp_path / "x").tensors) == ["a", "b"] and _left_over(tmp_path) == []


def test_an_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    def chunks() -> Iterator[tuple[str, Any]]:
        yield "a", A
        (tmp_path / "x").write_bytes(b"someone else's")
        yield "b", B

    with pytest.raises(ExistsError):
        write_safetensors(tmp_path / "x", PLAN, chunks())
    assert (tmp_path / "x").read_bytes() == b"someone else's" and _left_over(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_of_the_producer_passes_and_leaves_the_old_file(error: type[BaseException], tmp_path: Path) -> None:
    def chunks() -> Iterator[tuple[str, Any]]:
        yield "a", A
        raise error("mine")

    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(error, match="mine"):
        write_safetensors(tmp_path / "x", PLAN, chunks(), overwrite=True)
    assert (tmp_path / "x").read_bytes() == b"old" and _left_over(tmp_path) == []


def test_short_writes_are_continued(tmp_path: Path, tensors: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    save_file(tensors, tmp_path / "official")
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:7], at))
    write_safetensors(tmp_path / "ours", _plan(tensors), tensors.items())
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "official").read_bytes()


@pytest.mark.parametrize("call", ["pwrite", "fsync", "replace", "open"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_refusals_of_the_system_leave_the_old_file(
    call: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    (tmp_path / "x").write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(FileError) as caught:
            write_safetensors(tmp_path / "x", PLAN, [("a", A), ("b", B)], overwrite=True)
    assert caught.value.errno == code and str(tmp_path / "x") in str(caught.value)
    assert "another output directory" in (caught.value.hint or "")
    assert (tmp_path / "x").read_bytes() == b"old" and _left_over(tmp_path) == []


def test_a_full_disk_is_told_with_numbers_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Disk(NamedTuple):
        f_blocks: int = 100
        f_bavail: int = 10
        f_frsize: int = 4

    monkeypatch.setattr(os, "statvfs", lambda _: Disk())
    with pytest.raises(FileError, match="not enough free space") as caught:
        write_safetensors(tmp_path / "x", PLAN, iter(()))
    assert caught.value.got == "40 bytes free" and int(str(caught.value.expected).split()[0]) > 20
    assert list(tmp_path.iterdir()) == []


def test_files_get_the_usual_permissions(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "x", "")
    finally:
        os.umask(old)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


def test_text(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "grüße\n")
    assert (tmp_path / "a.json").read_bytes() == "grüße\n".encode()
    with pytest.raises(ExistsError):
        write_text(tmp_path / "a.json", "")
    write_text(tmp_path / "a.json", "new", overwrite=True)
    assert (tmp_path / "a.json").read_text() == "new" and _left_over(tmp_path) == []
    with pytest.raises(FileError, match="is a directory"):
        write_text(tmp_path, "x", overwrite=True)
    with pytest.raises(FileError, match="is a directory"):
        write_safetensors(tmp_path, PLAN, iter(()))


def test_a_link_is_replaced_and_its_target_kept(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("shared")
    (tmp_path / "x").symlink_to(tmp_path / "blob")
    write_text(tmp_path / "x", "new", overwrite=True)
    assert (tmp_path / "blob").read_text() == "shared" and not (tmp_path / "x").is_symlink()


def test_longest_file_names(tmp_path: Path) -> None:
    assert write_text(tmp_path / ("n" * 255), "x").read_text() == "x"
    with pytest.raises(FileError, match="name"):
        write_text(tmp_path / ("n" * 256), "x")
