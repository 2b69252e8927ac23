"""The order of modules against transformers' own classes, from a safetensors base that sorts its names."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratools as lt
from loratools.errors import NeedsBaseError, UnsupportedError
from loratools.formats.peft.module_order import _DEFINED, in_order
from loratools.io.base import Base

torch = pytest.importorskip("torch", reason="torch is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SMALL = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 11,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}  # fmt: skip
GPT2 = {"vocab_size": 31, "n_embd": 16, "n_layer": 11, "n_head": 4, "n_positions": 8}


def model_of(kind: str) -> Any:
    config = transformers.AutoConfig.for_model(kind, **(GPT2 if kind == "gpt2" else SMALL))
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", _DEFINED)
def test_the_order_is_that_of_the_class(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    model.save_pretrained(tmp_path)
    base = Base.open(tmp_path)
    linear = (torch.nn.Linear, torch.nn.Embedding, transformers.pytorch_utils.Conv1D)
    true = [n for n, m in model.named_modules() if isinstance(m, linear) and not n.endswith(("wpe", "lm_head"))]
    assert in_order(sorted(true), base, {}, "UNILORA") == true


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        ("UniLoraConfig", {"r": 2, "theta_d_length": 50}),
        ("TinyLoraConfig", {"r": 2, "u": 3, "weight_tying": 0.6, "save_projection": False}),
    ],
)
def test_numbered_modules_are_found_in_a_safetensors_base(config: str, fields: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = model_of("llama")
    model.save_pretrained(tmp_path / "base")
    before = {name: t.detach().clone().numpy() for name, t in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said = getattr(peft, config)(target_modules=["q_proj", "v_proj", "down_proj"], **fields)
        adapted = peft.get_peft_model(model, said)
        with torch.no_grad():
            for p in adapted.parameters():
                if p.requires_grad:
                    p.add_(torch.randn(p.shape) * 0.3)
        adapted.save_pretrained(tmp_path / "adapter")
        merged = adapted.merge_and_unload().state_dict()
    found = lt.load(tmp_path / "adapter", base=tmp_path / "base")
    assert len(found) == 33
    for name, u in found.items():
        d = merged[name].double().numpy() - before[name]
        assert np.abs(u.dense() - d).max() <= 1e-6 * max(np.abs(d).max(), 0.1), name


def test_what_the_base_does_not_tell_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NeedsBaseError, match="order"):
        in_order(["a"], None, {}, "TINYLORA")
    from safetensors.numpy import save_file

    save_file({"a.weight": np.zeros((2, 2), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedError, match="cannot be told"):
        in_order(["a"], Base.open(tmp_path / "model.safetensors"), {}, "TINYLORA")


def test_a_state_dict_keeps_the_order() -> None:
    base = Base.open({f"{name}.weight": np.zeros((2, 2), np.float32) for name in ("z", "a", "m")})
    assert in_order(["a", "m", "z"], base, {}, "TINYLORA") == ["z", "a", "m"]
