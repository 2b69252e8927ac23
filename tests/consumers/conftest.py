"""Adapters with planted faults, and what a program really does with them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

Tensors = dict[str, Any]
Config = dict[str, Any]
IDS = torch.arange(1, 13).reshape(2, 6)


class Llama:
    """A tiny Llama, its checkpoint on disk, and PEFT adapters of it."""

    def __init__(self, folder: Path) -> None:
        self.config = transformers.LlamaConfig(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=False,
        )  # fmt: skip
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(self.config).eval()
        self.weights = {k: v.clone() for k, v in model.state_dict().items()}
        self.base = folder / "base"
        model.save_pretrained(self.base)
        self.untouched = self.logits(model)

    def fresh(self) -> Any:
        model = transformers.LlamaForCausalLM(self.config).eval()
        model.load_state_dict(self.weights)
        return model

    def logits(self, model: Any) -> Any:
        with torch.no_grad():
            return model(input_ids=IDS).logits

    def adapter(self, folder: Path, **config: Any) -> Any:
        """Save a random adapter, as PEFT does; return the logits that it gives."""
        settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **config}
        model = peft.get_peft_model(self.fresh(), peft.LoraConfig(**settings)).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "original_module" not in name:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        model.save_pretrained(folder)
        return self.logits(model)

    def loaded(self, folder: Path) -> Any:
        """Return the logits of the base with the adapter of ``folder`` loaded by PEFT."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.logits(peft.PeftModel.from_pretrained(self.fresh(), folder).eval())

    def strength(self, logits: Any, reference: Any) -> float:
        """Return how much of the reference's effect the logits show: 0 none, 1 all, along its direction."""
        return strength(logits, reference, self.untouched)


def strength(got: Any, reference: Any, untouched: Any) -> float:
    wanted = (reference - untouched).flatten().double()
    return float((got - untouched).flatten().double() @ wanted / (wanted @ wanted))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    return Llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def plant() -> Callable[..., None]:
    """plant(folder, tensors=f, config=g): rewrite a PEFT directory with both changed."""
    from safetensors.torch import load_file, save_file

    def write(
        folder: Path,
        tensors: Callable[[Tensors], Tensors] = lambda t: t,
        config: Callable[[Config], Config] = lambda c: c,
    ) -> None:
        weights, sidecar = folder / "adapter_model.safetensors", folder / "adapter_config.json"
        changed = {k: v.contiguous().clone() for k, v in tensors(load_file(weights)).items()}
        save_file(changed, weights, metadata={"format": "pt"})
        sidecar.write_text(json.dumps(config(json.loads(sidecar.read_text()))))

    return write
