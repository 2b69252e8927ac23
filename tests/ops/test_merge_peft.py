"""PEFT's own merge_and_unload is the oracle of every kind of layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

pytest.importorskip("peft", reason="peft is not installed")

from loratools.files import load
from loratools.ops.merge import merge

EPS = float(np.finfo(np.float32).eps)
ATTENTION = ["q_proj", "v_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION}),
    "rslora": ("llama", {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ATTENTION}),
    "dora": ("llama", {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": [*ATTENTION, "down_proj"]}),
    "dora, rslora": ("llama", {"r": 4, "use_dora": True, "use_rslora": True, "target_modules": ATTENTION}),
    "patterns": (
        "llama",
        {"r": 4, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}, "target_modules": ATTENTION},
    ),
    "all linear, head": ("llama", {"r": 3, "target_modules": ["lm_head", "gate_proj", "o_proj"]}),
    "Conv1D": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "Conv1D dora": ("gpt2", {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
    "biases": ("gpt2", {"r": 4, "target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
    "lora_only biases": ("bert", {"r": 4, "target_modules": ["query"], "bias": "lora_only"}),
    "lora_bias": ("bert", {"r": 4, "target_modules": ["query", "value"], "lora_bias": True}),
    "saved modules": ("bert", {"r": 4, "target_modules": ["key"], "modules_to_save": ["classifier", "LayerNorm"]}),
    "encoder and decoder": ("t5", {"r": 4, "target_modules": ["q", "wo"]}),
    "embedding": ("llama", {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    "embedding dora": ("llama", {"r": 4, "target_modules": ["embed_tokens"], "use_dora": True}),
    "experts": ("mixtral", {"r": 2, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    "experts the other way": ("gpt_oss", {"r": 2, "target_parameters": ["mlp.experts.gate_up_proj"]}),
    "convolutions": ("convnet", {"r": 2, "target_modules": ["plane", "mix", "point", "line", "volume", "head"]}),
    "convolutions dora": ("convnet", {"r": 2, "target_modules": ["plane", "mix", "line"], "use_dora": True}),
    "attention module": ("attention", {"r": 2, "target_modules": ["mha"]}),
    "trained tokens": ("llama", {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": [3, 7]}),
}


def stored(made: Any, folder: Path, dtype: Any = np.float32) -> Path:
    """Write the base as training saw it."""
    folder.mkdir()
    weights = {k: np.ascontiguousarray(v.astype(dtype) if v.dtype.kind == "f" else v) for k, v in made.weights.items()}
    save_file(weights, folder / "model.safetensors")
    config = getattr(made.base, "config", None)
    if hasattr(config, "to_json_string"):
        (folder / "config.json").write_text(config.to_json_string())
    return folder


def merged_by_us(made: Any, tmp_path: Path, dtype: Any = np.float32) -> dict[str, Any]:
    base = stored(made, tmp_path / "base", dtype)
    merge(base, [load(made.folder, base=base)], tmp_path / "out")
    return load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_equals_peft(case: str, make: Callable[..., Any], tmp_path: Path) -> None:
    model, config = CASES[case]
    made = make(model, **config)
    ours, peft = merged_by_us(made, tmp_path), made.merged()
    assert set(ours) <= set(peft)
    changed = [name for name in ours if not np.array_equal(peft[name], made.weights[name])]
    assert changed
    for name, array in ours.items():
        # two fp32 products of a few columns and a quotient of norms, in another order
        assert np.abs(array - peft[name]).max() <= 32 * EPS * max(np.abs(peft[name]).max(), 1e-3), name


@pytest.mark.parametrize("case", ["lora", "dora"])
def test_half_precision_is_the_fp32_merge_rounded_once(case: str, make: Callable[..., Any], tmp_path: Path) -> None:
    model, config = CASES[case]
    made = make(model, **config)
    for name, parameter in made.base.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16().float()  # what the bf16 base stores: both start from the same
    ours, peft = merged_by_us(made, tmp_path, ml_dtypes.bfloat16), made.merged()
    for name, array in ours.items():
        once = peft[name].astype(ml_dtypes.bfloat16)
        flipped = (array != once).mean()
        # fp32 sums in another order differ by a few 2^-24; a value lies as near to the middle of two bf16 numbers (2^-8
        # apart) with a probability of about 8 * 2^-16
        assert flipped <= 1e-3, name
        assert np.abs(array.astype(np.float64) - once.astype(np.float64)).max() <= 2.0**-7 * np.abs(peft[name]).max()


def test_several_adapters_are_the_sum_of_what_peft_adds(make: Callable[..., Any], tmp_path: Path) -> None:
    one = make("llama", r=4, target_modules=ATTENTION)
    base = stored(one, tmp_path / "base")
    (tmp_path / "adapter").rename(tmp_path / "one")
    two = make("llama", r=2, target_modules=["q_proj"], use_dora=True)
    adapters = [load(tmp_path / "one", base=base), load(two.folder, base=base)]
    merge(base, adapters, tmp_path / "out", weights=[0.25, 2.0])
    ours, first, second = load_file(tmp_path / "out" / "model.safetensors"), one.merged(), two.merged()
    for name, w in one.weights.items():
        expected = w + 0.25 * (first[name] - w) + 2.0 * (second[name] - w)
        # PEFT's merged weights are rounded to fp32 before their difference is taken: twice eps |W|
        assert np.abs(ours[name] - expected).max() <= 64 * EPS * max(np.abs(w).max(), 1e-3), name
