"""LORA files mean what PEFT says they mean, and come back as PEFT wrote them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import loratools as lt
from loratools.core.update import Update

ATTENTION = {
    "llama": ["q_proj", "v_proj", "o_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "bert": ["query", "value"],
    "t5": ["q", "v", "wo"],
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "alpha0": {"lora_alpha": 0},
    "patterns": {
        "rank_pattern": {r".*layers?\.1\..*": 2, "h.1": 3},
        "alpha_pattern": {"q_proj": 5, "attn.c_attn": 6, "query": 7},
    },
    "rslora-patterns": {"use_rslora": True, "rank_pattern": {"v_proj|value|v|c_attn": 2}},
}
CASES = [(model, variant) for model in ATTENTION for variant in VARIANTS]


def config_for(model: str, variant: str) -> dict[str, Any]:
    extra = {"fan_in_fan_out": True} if model == "gpt2" else {}
    return {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION[model], **extra, **VARIANTS[variant]}


def folded(adapter: lt.Adapter, weights: dict[str, Any]) -> dict[str, Any]:
    """Fold an adapter into the base by the rule of the core: base names in order, then new parameters."""
    out = {name: adapter[name].apply(w) if name in adapter else w for name, w in weights.items()}
    return out | {name: u.apply(None) for name, u in adapter.items() if name not in weights}


def assert_equal_states(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name, w in theirs.items():
        assert np.abs(ours[name] - w).max() <= 2e-6 * max(np.abs(w).max(), 1.0), name  # a few fp32 roundings


@pytest.mark.parametrize(("model", "variant"), CASES)
def test_means_what_peft_says(make: Callable[..., Any], model: str, variant: str) -> None:
    made = make(model, **config_for(model, variant))
    adapter = lt.load(made.folder)
    assert all(isinstance(u, Update) for u in adapter.values())
    assert_equal_states(folded(adapter, made.weights), made.merged())


@pytest.mark.parametrize(("model", "variant"), CASES)
def test_comes_back_as_peft_wrote_it(make: Callable[..., Any], tmp_path: Path, model: str, variant: str) -> None:
    made = make(model, **config_for(model, variant))
    out = lt.save(lt.load(made.folder), tmp_path / "out")
    assert (out / "adapter_model.safetensors").read_bytes() == (made.folder / "adapter_model.safetensors").read_bytes()
    ours, theirs = (json.loads((d / "adapter_config.json").read_text()) for d in (out, made.folder))
    assert ours == theirs


@pytest.mark.parametrize(("model", "variant"), CASES)
def test_full_rank_squeeze_keeps_the_logits(
    make: Callable[..., Any], reload: Callable[..., Any], tmp_path: Path, model: str, variant: str
) -> None:
    made = make(model, **config_for(model, variant))
    expected = made.logits(made.model)
    out = lt.save(lt.squeeze(lt.load(made.folder), rank=64), tmp_path / "out")
    got = made.logits(reload(made, out))
    assert (got - expected).abs().max() <= 1e-5 * max(expected.abs().max(), 1)


@pytest.mark.parametrize("keep_alpha", [False, True])
@pytest.mark.parametrize(("model", "variant"), [(m, v) for m, v in CASES if v not in ("dora", "alpha0")])
def test_squeezed_logits_are_those_of_the_dense_optimum(
    make: Callable[..., Any], reload: Callable[..., Any], tmp_path: Path, model: str, variant: str, keep_alpha: bool
) -> None:
    import torch

    made = make(model, **config_for(model, variant))
    out = lt.save(lt.squeeze(lt.load(made.folder), rank=1, keep_alpha=keep_alpha), tmp_path / "out")
    got = made.logits(reload(made, out))
    optimum = {}
    for name, merged in made.merged().items():
        w, delta = merged, (merged.astype(np.float64) - made.weights[name]).reshape(merged.shape)
        if delta.ndim == 2 and np.abs(delta).max() > 1e-9:
            u, s, vh = np.linalg.svd(delta, full_matrices=False)
            w = (made.weights[name] + s[0] * np.outer(u[:, 0], vh[0])).astype(np.float32)
        optimum[name] = torch.from_numpy(np.array(w))
    made.base.load_state_dict(optimum)
    expected = made.logits(made.base)
    assert (got - expected).abs().max() <= 2e-5 * max(expected.abs().max(), 1)


def test_extras_are_carried(make: Callable[..., Any], reload: Callable[..., Any], tmp_path: Path) -> None:
    made = make("bert", r=4, lora_alpha=8, target_modules=["query", "value"], task_type="SEQ_CLS", bias="all")
    expected = made.logits(made.model)
    adapter = lt.load(made.folder)
    assert adapter["classifier.weight"].kind == "replace"
    assert adapter["bert.encoder.layer.0.attention.self.query.bias"].kind == "replace"
    out = lt.save(lt.squeeze(adapter, rank=64), tmp_path / "out")
    assert (made.logits(reload(made, out)) - expected).abs().max() <= 1e-5
    before, after = (load_file(d / "adapter_model.safetensors") for d in (made.folder, out))
    assert before.keys() == after.keys()


def test_lora_bias_is_a_difference_of_the_bias(
    make: Callable[..., Any], reload: Callable[..., Any], tmp_path: Path
) -> None:
    made = make("bert", r=4, lora_alpha=8, target_modules=["query", "value"], lora_bias=True)
    expected = made.logits(made.model)
    adapter = lt.load(made.folder)
    assert adapter["bert.encoder.layer.0.attention.self.query.bias"].kind == "dense"
    out = lt.save(lt.squeeze(adapter, rank=64), tmp_path / "out")
    assert (made.logits(reload(made, out)) - expected).abs().max() <= 1e-5
    assert_equal_states(folded(adapter, made.weights), made.merged())


def test_spellings_of_other_savers(make: Callable[..., Any], tmp_path: Path) -> None:
    """Adapter name left in, prefix missing, torch.compile's wrapper, one more .weight on the magnitude."""
    made = make("llama", **config_for("llama", "dora"))
    tensors = load_file(made.folder / "adapter_model.safetensors")
    config = json.loads((made.folder / "adapter_config.json").read_text())
    plain = lt.from_state_dict(tensors, config)
    spellings: list[Callable[[str], str]] = [
        lambda k: k.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."),
        lambda k: k.removeprefix("base_model.model."),
        lambda k: k.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda k: k.replace("lora_magnitude_vector", "lora_magnitude_vector.weight"),
        lambda k: k.replace("lora_magnitude_vector", "lora_magnitude_vector.default.weight"),
    ]
    for spelled in spellings:
        other = lt.from_state_dict({spelled(k): t for k, t in tensors.items()}, config)
        assert list(other) == list(plain)
        for name, u in plain.items():
            assert np.array_equal(other[name].apply(made.weights[name]), u.apply(made.weights[name])), name
        assert lt.save(other, tmp_path / "o", overwrite=True)
        written = load_file(tmp_path / "o" / "adapter_model.safetensors")
        assert written.keys() == tensors.keys()
        assert all(np.array_equal(written[key], t) for key, t in tensors.items())
