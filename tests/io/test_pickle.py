from __future__ import annotations

import os
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from loratools.errors import FormatError, MissingExtraError
from loratools.io import zips
from loratools.io.read import open_bundle

torch = pytest.importorskip("torch", reason="torch is not installed")


class Runs:
    """Unpickled carelessly, it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture(params=["zip", "legacy"])
def save(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    def write(held: Any) -> Path:
        torch.save(held, tmp_path / "a.bin", _use_new_zipfile_serialization=request.param == "zip")
        return tmp_path / "a.bin"

    return write


def test_tensors_as_numpy_arrays(save: Any) -> None:
    bundle = open_bundle(save({"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones((), dtype=torch.int64)}))
    assert bundle.container == "pickle" and list(bundle.tensors) == ["b", "a"]
    array = bundle.tensors["b"].read()
    assert isinstance(array, np.ndarray) and array.dtype == np.float32
    np.testing.assert_array_equal(array, np.arange(6.0).reshape(2, 3))
    assert bundle.tensors["a"].read().shape == ()


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_dtypes_that_numpy_lacks(dtype: str, tmp_path: Path) -> None:
    values = torch.tensor([[1.5, -2.0, 0.25]]).to(getattr(torch, dtype))
    torch.save({"t": values}, tmp_path / "a.pt")  # the older layout of torch has no fp8
    leaf = open_bundle(tmp_path / "a.pt").tensors["t"]
    array = leaf.read()
    assert leaf.dtype == dtype and array.dtype == np.dtype(getattr(ml_dtypes, dtype))
    np.testing.assert_array_equal(array.astype(np.float32), values.float().numpy())


def test_shared_storage_transposes_and_parameters(save: Any) -> None:
    whole = torch.arange(12.0)
    held = {"whole": whole, "part": whole[3:6], "t": whole.reshape(3, 4).T, "p": torch.nn.Parameter(torch.ones(2))}
    tensors = open_bundle(save(held)).tensors
    np.testing.assert_array_equal(tensors["part"].read(), [3.0, 4.0, 5.0])
    np.testing.assert_array_equal(tensors["t"].read(), np.arange(12.0).reshape(3, 4).T)
    np.testing.assert_array_equal(tensors["p"].read(), [1.0, 1.0])


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "module", "model_state_dict"])
def test_one_wrapper_is_taken_off_and_plain_values_are_kept(wrapper: str, save: Any) -> None:
    bundle = open_bundle(save({wrapper: {"t": torch.ones(1), "scale": 0.5}, "epoch": 3, "name": "x"}))
    assert list(bundle.tensors) == ["t"]
    assert bundle.metadata == {"scale": "0.5", "epoch": "3", "name": "x"}


def test_a_list_is_numbered(save: Any) -> None:
    assert list(open_bundle(save([torch.ones(1), torch.ones(2)])).tensors) == ["0", "1"]


T = torch.ones(1)
ODD: dict[str, tuple[Any, str]] = {
    "two wrappers": ({"model": {"t": T}, "state_dict": {"t": T}}, "model"),
    "wrapper and tensors": ({"model": {"t": T}, "u": T}, "tensors beside them"),
    "same name inside and outside": ({"model": {"t": T, "epoch": 1}, "epoch": 2}, "epoch"),
    "other entries": ({"model": {"t": T}, "tables": {"state": {}}}, "tables (dict)"),
    "unnamed nesting": ({"lora": {"t": T}}, "lora (dict)"),
    "a list with more": ([T, "x"], "1 (str)"),
    "a tensor alone": (T, "Tensor"),
    "numbered tensors": ({1: T}, "1"),
    "an expanded tensor": ({"t": torch.zeros(1).expand(1000, 1000)}, "strides"),
    "a sparse tensor": ({"t": torch.eye(3).to_sparse()}, "sparse"),
    "a wide complex": ({"t": torch.zeros(2, dtype=torch.complex128)}, "complex128"),
}


@pytest.mark.parametrize("case", ODD)
def test_what_is_no_state_dict_is_told(case: str, save: Any) -> None:
    held, told = ODD[case]
    path = save(held)
    with pytest.raises(FormatError) as caught:
        open_bundle(path)
    assert told in str(caught.value) and str(path) in str(caught.value)


def test_the_state_of_an_optimizer_beside_the_model_is_left_out_and_named(save: Any) -> None:
    bundle = open_bundle(save({"model": {"t": T}, "optimizer": {"state": {0: {"exp_avg": T}}}, "epoch": 3}))
    assert list(bundle.tensors) == ["t"]
    assert bundle.metadata["loratools.training_state"] == "optimizer"
    assert bundle.metadata["epoch"] == "3"


def test_a_malicious_pickle_executes_nothing(save: Any, tmp_path: Path) -> None:
    path = save({"t": T, "evil": Runs(tmp_path / "ran")})
    with pytest.raises(FormatError, match="nothing was executed") as caught:
        open_bundle(path)
    assert "mkdir" in str(caught.value.got)
    assert not (tmp_path / "ran").exists()


def test_a_bare_malicious_pickle_executes_nothing(tmp_path: Path) -> None:
    for protocol in range(2, 6):
        (tmp_path / "a.pt").write_bytes(pickle.dumps(Runs(tmp_path / "ran"), protocol))
        with pytest.raises(FormatError, match="nothing was executed"):
            open_bundle(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.98])
def test_damaged_files(keep: float, save: Any) -> None:
    path = save({"t": torch.ones(100)})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(FormatError) as caught:
        open_bundle(path)
    assert str(path) in str(caught.value) and "download" in (caught.value.hint or "")


def test_a_recompressed_archive_is_not_mapped(tmp_path: Path) -> None:
    torch.save({"t": torch.arange(500.0)}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as old,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for member in old.namelist():
            new.writestr(member, old.read(member))
    np.testing.assert_array_equal(open_bundle(tmp_path / "b.pt").tensors["t"].read(), np.arange(500.0))


def test_a_bomb_is_refused_before_torch_sees_it(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(zips, "_FREE_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\0" * 10_000_000)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(FormatError, match="nothing was unpacked"):
        open_bundle(tmp_path / "a.pt")


def test_without_torch_the_install_line_is_told(save: Any, monkeypatch: Any) -> None:
    path = save({"t": T})
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError) as caught:
        open_bundle(path)
    assert "loratools[torch]" in (caught.value.hint or "")


def test_a_torch_with_an_unsafe_unpickler_is_not_used(save: Any, monkeypatch: Any) -> None:
    path = save({"t": T})
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(MissingExtraError, match="safely"):
        open_bundle(path)
