"""Bytes changed anywhere: a file is read, or refused with one of our errors; nothing else comes out."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from loratools.errors import LoratoolsError
from loratools.io.read import open_bundle

HELD = {"a.lora_A.weight": np.ones((3, 4), np.float32), "b": np.zeros((2, 2), np.float16)}


def _npz() -> bytes:
    held = io.BytesIO()
    np.savez(held, **HELD)  # type: ignore[arg-type]
    return held.getvalue()


def _pickle(zipped: bool) -> bytes:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    held = io.BytesIO()
    tensors = {name: torch.from_numpy(array) for name, array in HELD.items()}
    torch.save(tensors, held, _use_new_zipfile_serialization=zipped)
    return held.getvalue()


SEEDS = {
    "safetensors": lambda: save(HELD, metadata={"format": "pt"}),
    "npz": _npz,
    "torch": lambda: _pickle(True),
    "torch, older layout": lambda: _pickle(False),
}


@pytest.mark.parametrize("container", SEEDS)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_are_read_or_refused(container: str, data: Any, tmp_path: Path) -> None:
    content = bytearray(SEEDS[container]())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=4))
    path = tmp_path / "damaged"
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    try:
        for leaf in open_bundle(path).tensors.values():
            assert leaf.read().shape == leaf.shape
    except LoratoolsError as error:
        assert str(path) in str(error)
