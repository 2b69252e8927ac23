"""Files that others trained: everything opens, and equals what the official readers make of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from loratools.io.bundle import Bundle
from loratools.io.read import open_bundle
from loratools.io.write import TensorPlan, write_safetensors

pytestmark = pytest.mark.real


def _bundles(real: Path) -> list[Bundle]:
    return [open_bundle(folder) for folder in sorted(real.iterdir()) if folder.is_dir()]


def test_safetensors_equal_the_official_reader(real: Path) -> None:
    found = [bundle for bundle in _bundles(real) if bundle.container == "safetensors"]
    assert found
    for bundle in found:
        official = load_file(str(bundle.path))
        assert set(official) == set(bundle.tensors)
        for name, leaf in bundle.tensors.items():
            np.testing.assert_array_equal(leaf.read(), official[name])


def test_pickles_equal_torch(real: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    found = [bundle for bundle in _bundles(real) if bundle.container == "pickle"]
    assert found
    for bundle in found:
        held = torch.load(bundle.path, weights_only=True, map_location="cpu")
        held = held if isinstance(held, dict) else {str(i): tensor for i, tensor in enumerate(held)}
        assert list(held) == list(bundle.tensors)
        for name, leaf in bundle.tensors.items():
            np.testing.assert_array_equal(leaf.read(), held[name].detach().numpy())


def test_npz_equal_numpy(real: Path) -> None:
    found = [bundle for bundle in _bundles(real) if bundle.container == "npz"]
    assert found
    for bundle in found:
        with np.load(str(bundle.path), allow_pickle=False) as held:
            assert held.files == list(bundle.tensors)
            for name, leaf in bundle.tensors.items():
                np.testing.assert_array_equal(leaf.read(), held[name])


def test_rewriting_keeps_every_tensor(real: Path, tmp_path: Path) -> None:
    for i, bundle in enumerate(_bundles(real)):
        plan = [TensorPlan(name, leaf.dtype, leaf.shape) for name, leaf in bundle.tensors.items()]
        chunks = ((name, leaf.read()) for name, leaf in bundle.tensors.items())
        path = write_safetensors(tmp_path / str(i), plan, chunks, metadata=bundle.metadata or None)
        again = load_file(str(path))
        assert set(again) == set(bundle.tensors)
        for name, leaf in bundle.tensors.items():
            assert again[name].tobytes() == leaf.read().tobytes()
