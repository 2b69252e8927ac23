from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

Raw = Callable[..., Path]


@pytest.fixture
def tensors() -> dict[str, Any]:
    """Two factors whose values tell their places."""
    return {
        "m.q.lora_A.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
        "m.q.lora_B.weight": np.arange(15, dtype=np.float16).reshape(5, 3),
    }


@pytest.fixture
def adapter(tmp_path: Path, tensors: dict[str, Any]) -> Path:
    """A PEFT directory with a tokenizer, a README and things that must not be copied."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 3}))
    (folder / "README.md").write_text("# hello")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ x }}")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", ".hidden", "a.gguf"):
        (folder / name).write_bytes(b"no")
    (folder / "checkpoint-5").mkdir()
    return folder


@pytest.fixture
def raw_file(tmp_path: Path) -> Raw:
    """Write a safetensors file from a header (object or bytes), the bytes after it, and a stated header length."""

    def write(header: Any, data: bytes = b"", length: int | None = None) -> Path:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        path = tmp_path / "raw.safetensors"
        path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
        return path

    return write


@pytest.fixture
def permissions_bind(tmp_path: Path) -> None:
    """Skip where this process may read and write everything (root)."""
    probe = tmp_path / "probe"
    probe.mkdir(0o000)
    if os.access(probe, os.R_OK):
        pytest.skip("permissions do not bind this process (root)")
    probe.chmod(0o700)
    probe.rmdir()


@pytest.fixture
def zip_of(tmp_path: Path) -> Callable[[dict[str, bytes]], Path]:
    """Write a zip archive (deflated) of the given members."""

    def write(members: dict[str, bytes]) -> Path:
        path = tmp_path / "archive.npz"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        return path

    return write
