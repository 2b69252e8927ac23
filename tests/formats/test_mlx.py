"""MLX itself (CPU): a model's layers with our adapters.safetensors loaded by mlx-lm, and by PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratools as lt
from loratools.errors import ConversionError, MissingScaleError
from loratools.formats.base import FORMATS
from loratools.io.bundle import from_memory

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
tuner = pytest.importorskip("mlx_lm.tuner.utils", reason="mlx-lm is not installed")
torch = pytest.importorskip("torch", reason="torch is not installed")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def mlx_llama(weights: dict[str, Any]) -> Any:
    """mlx-lm's Llama with the same random weights as the transformers model."""
    from mlx_lm.models import llama

    arguments = llama.ModelArgs(
        model_type="llama", hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=4,
        rms_norm_eps=1e-6, vocab_size=61, num_key_value_heads=2, tie_word_embeddings=False, rope_theta=10000.0,
    )  # fmt: skip
    model = llama.Model(arguments)
    model.load_weights([(k, mx.array(v)) for k, v in weights.items() if "rotary" not in k])
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 8},
        {"r": 4, "lora_alpha": 6, "use_rslora": True},
        {"r": 4, "lora_alpha": 8, "rank_pattern": {"1.*": 2}, "alpha_pattern": {"0.*": 3}},
        {"r": 4, "lora_alpha": 8, "use_dora": True},
        {"r": 4, "lora_alpha": 8, "layers_to_transform": [1]},
    ],
    ids=["plain", "rslora", "patterns", "dora", "some-layers"],
)
def test_mlx_lm_applies_what_we_write(settings: dict[str, Any], make: Callable[..., Any], tmp_path: Path) -> None:
    made = make("llama", target_modules=TARGETS, **settings)
    ids = torch.arange(1, 13).reshape(2, 6)
    with torch.no_grad():
        wanted = made.model(input_ids=ids).logits.numpy()
    folder = lt.save(lt.load(made.folder), tmp_path / "mlx", format="mlx")
    assert {p.name for p in folder.iterdir()} >= {"adapters.safetensors", "adapter_config.json"}
    model = mlx_llama(made.weights)
    plain = np.array(model(mx.array(ids.numpy())))
    tuner.load_adapters(model, str(folder))
    got = np.array(model(mx.array(ids.numpy())))
    assert np.abs(wanted - plain).max() > 1e-3
    # fp32 in two libraries, two layers: 1e-4 of logits of size one
    assert np.abs(got - wanted).max() <= 1e-4 * max(1.0, np.abs(wanted).max())


def test_a_file_of_mlx_is_read(make: Callable[..., Any], tmp_path: Path) -> None:
    """mlx-lm makes the layers and saves them; we fold, and a layer's output agrees."""
    made = make("llama", target_modules=["q_proj"], r=2)
    model = mlx_llama(made.weights)
    parameters = {"rank": 3, "scale": 7.5, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    tuner.linear_to_lora_layers(model, 2, parameters)
    layer = model.model.layers[1].self_attn.q_proj
    layer.lora_b = mx.random.normal(layer.lora_b.shape) * 0.1
    stem = "model.layers.1.self_attn.q_proj"
    folder = tmp_path / "a"
    folder.mkdir()
    mx.save_safetensors(
        str(folder / "adapters.safetensors"), {f"{stem}.lora_a": layer.lora_a, f"{stem}.lora_b": layer.lora_b}
    )
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    adapter = lt.load(folder)
    w = adapter[f"{stem}.weight"].apply(made.weights[f"{stem}.weight"])
    x = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    assert np.allclose(x @ w.T, np.array(layer(mx.array(x))), atol=1e-5)


def test_an_old_npz_has_no_scale(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "adapters.npz"
    stem = "model.layers.0.self_attn.q_proj"
    np.savez(path, **{f"{stem}.lora_a": rng.standard_normal((8, 2)), f"{stem}.lora_b": rng.standard_normal((2, 8))})
    adapter = lt.load(path)
    assert not adapter.meta.scaled
    with pytest.raises(MissingScaleError, match="--scale"):
        lt.save(adapter, tmp_path / "p", format="peft")
    done = lt.convert(adapter, "peft", scale=20.0)
    back = lt.load(lt.save(done, tmp_path / "p", format="peft"))
    a, b = (np.load(path)[f"{stem}.lora_{x}"] for x in "ab")
    assert np.allclose(back[f"{stem}.weight"].dense(), 20.0 * (a @ b).T)


def test_magnitudes_on_some_modules_only_are_refused(make: Callable[..., Any]) -> None:
    made = make("llama", target_modules=["q_proj"], r=2, use_dora=True)
    adapter = lt.load(made.folder)
    name = next(iter(adapter))
    mixed = adapter.map(lambda n, u: u.direction if n == name else u)
    with pytest.raises(ConversionError, match="some modules"):
        FORMATS["mlx"].encode(mixed)


def test_embeddings_are_not_transposed() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((11, 2)), rng.standard_normal((2, 5))
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 3.0}}
    bundle = from_memory({"model.embed_tokens.lora_a": a, "model.embed_tokens.lora_b": b}, config)
    adapter = FORMATS["mlx"].decode(bundle)
    assert np.allclose(adapter["model.embed_tokens.weight"].dense(), 3.0 * a @ b)
    again = FORMATS["mlx"].encode(adapter)
    assert again.tensors["model.embed_tokens.lora_a"].shape == (11, 2)
