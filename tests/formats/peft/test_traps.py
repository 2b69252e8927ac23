"""Files that look like plain LoRA and are not, and PEFT's own wrong answer about DoRA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loratools as lt
from loratools.errors import FormatError, UnsupportedError
from loratools.ops.types.lora import to_lora

torch = pytest.importorskip("torch", reason="torch is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_altered_its_base_is_no_plain_lora(
    init: str, oracle: Callable[..., Any], tmp_path: Path
) -> None:
    """s B A on the original base is wrong by what the initialisation took out of it: refused, and said when read."""
    made = oracle("LoraConfig", ("down", "up"), r=4, lora_alpha=4, init_lora_weights=init)
    adapter, true = made.read(), made.changes()
    for name, d in true.items():
        assert np.abs(adapter[name].dense() - d).max() > 0.05  # read as plain LoRA
    assert any("altered base" in remark for remark in adapter.meta.remarks)
    save_file(made.base, tmp_path / "base.safetensors")
    with pytest.raises(UnsupportedError, match="changed the base"):
        lt.merge(tmp_path / "base.safetensors", [adapter], tmp_path / "out.safetensors")
    with pytest.raises(UnsupportedError, match="changed the base"):
        lt.fuse([adapter, adapter])
    assert not (tmp_path / "out.safetensors").exists()


def test_lora_xs_without_its_core_is_detected(oracle: Callable[..., Any]) -> None:
    """Without R the factors alone would be read as B A: the program's own settings beside them tell."""
    made = oracle("LoraConfig", ("down",), r=4)
    assert made.read()
    (made.folder / "reconstr_config.json").write_text('{"reconstruction_type": "svd"}')
    with pytest.raises(FormatError, match="LoRA-XS"):
        made.read()
    weights = made.folder / "adapter_model.safetensors"
    core = np.diag(np.arange(1.0, 5.0)).astype(np.float32)
    tensors = load_file(weights)
    save_file({**tensors, "base_model.model.down.default_lora_latent_mapping.weight": core}, weights)
    a, b = (tensors[f"base_model.model.down.lora_{x}.weight"].astype(np.float64) for x in "AB")
    assert np.abs(made.read()["down.weight"].dense() - 2.0 * b @ core @ a).max() <= 1e-5


def test_dora_as_lora_is_not_what_peft_makes_of_it(oracle: Callable[..., Any]) -> None:
    """PEFT's conversion leaves the magnitude out; ours is the difference on the base, exactly, at full rank."""
    from peft.tuners.lora.conversion import convert_to_lora

    made = oracle("LoraConfig", ("down", "square"), r=4, use_dora=True)
    with torch.no_grad():
        for name, p in made.model.named_parameters():
            if "magnitude" in name:
                p.mul_(1.5)
    made.model.save_pretrained(made.folder)
    adapter = made.read()
    said, theirs = convert_to_lora(made.model, rank=24, progressbar=False)
    true = made.changes()
    ours = to_lora(adapter, made.base, rank=24, exact=True)
    for name, d in true.items():
        path = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (next(v.double().numpy() for k, v in theirs.items() if path in k and f"lora_{x}" in k) for x in "AB")
        wrong = np.linalg.norm(b @ a * said.lora_alpha / said.r - d) / np.linalg.norm(d)
        right = np.linalg.norm(ours[name].dense() - d) / np.linalg.norm(d)  # type: ignore[attr-defined]
        assert wrong > 0.3
        assert right <= 2e-6
