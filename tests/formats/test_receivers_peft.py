"""PEFT itself, on tiny transformers models, before and after a journey through every format of language models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratools as lt
from loratools.io.read import open_bundle

TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "bert": ["query", "key", "value", "dense"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 8, "rank_pattern": {"1.*": 2}, "alpha_pattern": {"0.*": 3}},
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True},
}
JOURNEYS = [
    *[
        (model, to, how)
        for model in TARGETS
        for to in ("kohya", "lycoris", "mlx", "loralib", "native")
        for how in SETTINGS
    ],
    *[(model, "gguf", how) for model in ("llama", "gpt2") for how in ("plain", "rslora", "patterns")],
    *[("llama", "torchtune", how) for how in SETTINGS],
    *[("llama", "litgpt", how) for how in ("plain", "rslora")],
]


def base_folder(made: Any, folder: Path) -> Path:
    made.base.config.save_pretrained(folder)
    from safetensors.numpy import save_file

    save_file({k: np.ascontiguousarray(v) for k, v in made.weights.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(("model", "to", "how"), JOURNEYS, ids=lambda v: v)
def test_logits_survive_the_journey(
    model: str, to: str, how: str, make: Callable[..., Any], reload: Callable[..., Any], tmp_path: Path
) -> None:
    if how == "dora" and to == "loralib":
        pytest.skip("loralib has no magnitudes")
    made = make(model, target_modules=TARGETS[model], **SETTINGS[how])
    wanted = made.logits(made.model)
    base = base_folder(made, tmp_path / "base")
    adapter = lt.load(made.folder, base=base)
    suffix = ".gguf" if to == "gguf" else ".safetensors"
    there = tmp_path / "there" if to == "mlx" else tmp_path / f"there{suffix}"
    (tmp_path / "back").mkdir()
    lt.save(adapter, there, format=to, base=base)
    again = lt.load(there, base=base)
    if not again.meta.scaled:
        again = lt.convert(again, "peft", scale=1.0)  # these writers multiply the scale into the factors
    back = lt.save(again, tmp_path / "back" / "adapter", format="peft", base=base)
    got = made.logits(reload(made, back))
    # fp32 on both sides, two layers: a few roundings of logits of size one
    assert (got - wanted).abs().max() <= 1e-5 * max(1.0, wanted.abs().max())


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_our_folding_of_every_format_is_pefts(model: str, make: Callable[..., Any], tmp_path: Path) -> None:
    made = make(model, target_modules=TARGETS[model], r=4, lora_alpha=6)
    base = base_folder(made, tmp_path / "base")
    adapter = lt.load(made.folder, base=base)
    wanted = made.merged()
    for to in ("kohya", "mlx", "gguf"):
        file = {"kohya": "x.safetensors", "mlx": "mlx", "gguf": "x.gguf"}[to]
        path = lt.save(adapter, tmp_path / file, format=to, base=base)
        again = lt.load(path, base=base)
        for name, u in again.items():
            assert np.allclose(u.apply(made.weights[name]), wanted[name], atol=1e-5)


def test_a_language_model_needs_no_base_for_names_that_are_known(make: Callable[..., Any], tmp_path: Path) -> None:
    made = make("llama", target_modules=TARGETS["llama"], r=2)
    adapter = lt.load(made.folder)
    for prefix in ("lora_te", "lora_llm", "lycoris"):
        path = lt.save(adapter, tmp_path / f"{prefix}.safetensors", format="kohya", prefix=prefix)
        assert all(key.startswith(f"{prefix}_model_layers_") for key in open_bundle(path).tensors)
        assert list(lt.load(path)) == list(adapter)


def test_unknown_language_models_carry_their_names(make: Callable[..., Any], tmp_path: Path) -> None:
    made = make("bert", target_modules=["query"], r=2)
    adapter = lt.load(made.folder)
    renamed = lt.convert(adapter, "kohya", rename=(r"^bert\.=strange_tree.",))
    path = lt.save(renamed, tmp_path / "k.safetensors", format="kohya")
    names = json.loads(lt.load(path).meta.metadata["loratools.names"])
    assert len(names) == len(adapter)
    assert list(lt.load(path)) == list(renamed)
