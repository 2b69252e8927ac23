"""Folders as PEFT and the Trainer leave them: several adapters, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import loratools as lt
from loratools.errors import FormatError

torch = pytest.importorskip("torch", reason="torch is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")


def model(*others: str) -> Any:
    net = torch.nn.Sequential(torch.nn.Linear(8, 8))
    made = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0"]))
    for name in others:
        made.add_adapter(name, peft.LoraConfig(r=3, target_modules=["0"]))
    return made


def test_an_adapter_in_a_subfolder_is_read_by_its_path(tmp_path: Path) -> None:
    model("german", "french").save_pretrained(tmp_path / "all", selected_adapters=["german", "french"])
    with pytest.raises(FormatError) as caught:
        lt.load(tmp_path / "all")
    assert "french/" in str(caught.value)
    assert "german/" in str(caught.value)
    assert lt.load(tmp_path / "all" / "german")["0.weight"].rank == 3  # type: ignore[attr-defined]


def test_the_adapter_of_the_folder_itself_is_meant_and_the_others_are_told(tmp_path: Path) -> None:
    model("german").save_pretrained(tmp_path / "all")
    adapter = lt.load(tmp_path / "all")
    assert adapter["0.weight"].rank == 2  # type: ignore[attr-defined]
    assert any("german/" in remark for remark in adapter.meta.remarks)


def test_a_trainers_checkpoint_without_its_state(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoint-10"
    model().save_pretrained(folder)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "training_args.bin"):
        torch.save({"state": 1}, folder / name)
    (folder / "trainer_state.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    out = lt.save(lt.load(folder), tmp_path / "out")
    kept = {path.name for path in out.iterdir()}
    assert kept == {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    with pytest.raises(FormatError, match="no weights file") as caught:
        lt.load(tmp_path / "run")
    assert "checkpoint-10/" in str(caught.value)
