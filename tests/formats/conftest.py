"""Tiny transformers models with randomised PEFT adapters: the oracle of what an adapter file means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    )


def bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, num_labels=3
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def t5() -> Any:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
    )


def tied() -> Any:
    """A Llama whose head is its embedding."""
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def mixtral() -> Any:
    """Three experts, stored (experts, out, in)."""
    config = transformers.MixtralConfig(
        vocab_size=61, hidden_size=32, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def gpt_oss() -> Any:
    """Three experts, stored (experts, in, out); down_proj is square."""
    config = transformers.GptOssConfig(
        vocab_size=61, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():  # some are made empty
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
    return model


class ConvNet(torch.nn.Module):
    """Convolutions of every kind that PEFT adapts, plain and grouped."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.plane = torch.nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.mix = torch.nn.Conv2d(6, 8, (3, 1), groups=groups)
        self.point = torch.nn.Conv2d(8, 5, 1)
        self.line = torch.nn.Conv1d(5, 6, 3)
        self.volume = torch.nn.Conv3d(2, 3, 2)
        self.head = torch.nn.Linear(3, 3)

    def forward(self, pixels: Any) -> Any:
        x = self.point(torch.relu(self.mix(torch.relu(self.plane(pixels)))))  # (n, 5, h, w)
        x = self.line(x.flatten(2))  # (n, 6, l)
        x = self.volume(x.reshape(x.shape[0], 2, 3, 2, -1))
        return self.head(x.mean(dim=(2, 3, 4)))


class Attention(torch.nn.Module):
    """nn.MultiheadAttention, whose projections are no modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = torch.nn.Linear(8, 5)

    def forward(self, x: Any) -> Any:
        return self.head(self.mha(x, x, x)[0])


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama, "gpt2": gpt2, "bert": bert, "t5": t5, "tied": tied, "mixtral": mixtral, "gpt_oss": gpt_oss,
    "convnet": ConvNet, "grouped": lambda: ConvNet(groups=2), "attention": Attention,
}  # fmt: skip


def inputs(model: str) -> dict[str, Any]:
    """Return a fixed input of a model."""
    ids = torch.arange(1, 13).reshape(2, 6)
    waves = torch.sin(torch.arange(4096) * 0.7)
    special = {
        "t5": {"input_ids": ids, "decoder_input_ids": ids},
        "convnet": {"pixels": waves[: 2 * 4 * 12 * 13].reshape(2, 4, 12, 13)},
        "grouped": {"pixels": waves[: 2 * 4 * 12 * 13].reshape(2, 4, 12, 13)},
        "attention": {"x": waves[: 2 * 6 * 8].reshape(2, 6, 8)},
    }
    return special.get(model, {"input_ids": ids})


class Made:
    """A base model, its adapter on disk, and what PEFT says they mean."""

    def __init__(self, name: str, folder: Path, **config: Any) -> None:
        torch.manual_seed(0)
        self.name = name
        self.base = MODELS[name]().eval()
        self.weights = {name: tensor.detach().clone().numpy() for name, tensor in self.base.state_dict().items()}
        self.model = peft.get_peft_model(self.base, peft.LoraConfig(**config)).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad and "original_module" not in name:
                    noise = torch.randn(parameter.shape, generator=generator) * 0.05
                    if "magnitude" in name:
                        parameter.mul_(1 + noise)
                    else:
                        parameter.add_(noise)
        self.folder = folder
        self.model.save_pretrained(folder)

    def logits(self, model: Any) -> Any:
        """Outputs on a fixed input; the model may be a PeftModel or a plain one."""
        with torch.no_grad():
            found = model(**inputs(self.name))
        return getattr(found, "logits", found)

    def merged(self) -> dict[str, Any]:
        """The state dict of PEFT's own merge."""
        return {k: v.detach().numpy() for k, v in self.model.merge_and_unload().state_dict().items()}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Made]:
    """make("llama", r=4, ...) -> Made."""
    return lambda model, **config: Made(model, tmp_path / "adapter", **config)


@pytest.fixture
def reload() -> Callable[..., Any]:
    """reload(made, folder) -> a fresh base model with the adapter of ``folder`` loaded by PEFT."""

    def load(made: Made, folder: Path) -> Any:
        torch.manual_seed(0)
        base = MODELS[made.name]()
        base.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in made.weights.items()})
        return peft.PeftModel.from_pretrained(base.eval(), folder).eval()

    return load
