"""stats as a user meets it, and its file in the commands that take it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

pytest.importorskip("torch", reason="needs the extra calibrate")
pytest.importorskip("transformers", reason="needs the extra calibrate")


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    held = {"pixel_values": rng.standard_normal((6, 1, 8, 8)).astype("f4"), "labels": np.arange(6) % 10}
    save_file(held, tmp_path / "inputs.safetensors")
    return tmp_path / "inputs.safetensors"


def test_from_a_model_to_a_weighted_squeeze(
    run: Callable[..., Any], digits: Path, inputs: Path, tmp_path: Path
) -> None:
    stats = tmp_path / "stats.safetensors"
    more = ["--adapter", digits / "r4", "--gradients", "--batch", "4", "--json"]
    code, out, err = run("stats", digits / "base", "--inputs", inputs, "-o", stats, *more)
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert said["schema"] == "loratools.stats/1"
    assert said["output"]["path"] == str(stats)
    assert said["inputs"][0]["identity"]
    assert len(said["modules"]) == said["total"]["modules"] == 16
    held = load_file(stats)
    assert held.keys() == {f"{row['name']}.{key}" for row in said["modules"] for key in ("in_diag", "out_diag")}
    done = run("squeeze", digits / "r4", "--rank", "1", "--stats", stats, "--json", "--dry-run")
    assert done.code == 0
    report = json.loads(done.out)
    assert report["warnings"] == []
    plain = json.loads(run("squeeze", digits / "r4", "--rank", "1", "--json", "--dry-run").out)
    assert report["total"]["relative_error"] > plain["total"]["relative_error"]
    assert 0 < report["total"]["weighted_error"] < 1
    both = run(
        "fuse", digits / "r4", digits / "r1", "--method", "regmean", "--stats", stats, "--stats", stats, "--dry-run"
    )
    assert both.code == 0
    assert run("stats", digits / "base", "--inputs", inputs, "-o", stats).code == 2  # it exists
    gram = run(
        "stats", digits / "base", "--inputs", inputs, "--gram", "--fail-on", "peak>1", "-o", tmp_path / "g.safetensors"
    )
    assert gram.code == 1
    assert not (tmp_path / "g.safetensors").exists()


def test_wrong_usage(run: Callable[..., Any], digits: Path, inputs: Path, tmp_path: Path) -> None:
    base = digits / "base"
    words = tmp_path / "words.txt"
    words.write_text("a line\n")
    uneven = tmp_path / "uneven.safetensors"
    save_file({"pixel_values": np.zeros((6, 1, 8, 8), np.float32), "labels": np.zeros(5, np.int64)}, uneven)
    strange = tmp_path / "strange.safetensors"
    save_file({"pixels": np.zeros((6, 1, 8, 8), np.float32)}, strange)
    out = ["-o", tmp_path / "out.safetensors"]
    for args, said in (
        ([base, *out], "one of them"),
        ([base, "--inputs", inputs, "--text", words, *out], "one of them"),
        ([digits / "base" / "model.safetensors", "--inputs", inputs, *out], "directory of a model"),
        ([base, "--inputs", tmp_path / "nowhere", *out], "no such file"),
        ([base, "--inputs", words, *out], str(words)),
        ([base, "--inputs", uneven, *out], "number of samples"),
        ([base, "--text", words, *out], "no tokenizer"),
        ([base, "--inputs", strange, *out], "cannot run on these inputs"),
    ):
        done = run("stats", *args)
        assert done.code == 2, args
        assert said in done.err, args
    assert not (tmp_path / "out.safetensors").exists()


def test_a_language_model_reads_text(run: Callable[..., Any], tmp_path: Path) -> None:
    """Lines of different lengths are padded, and what is padding is not seen."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["<pad>", "one", "two", "three"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder, text, out = tmp_path / "llama", tmp_path / "text.txt", tmp_path / "stats.safetensors"
    transformers.PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>").save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=4, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        llama = transformers.LlamaForCausalLM(config)
    llama.save_pretrained(folder)
    text.write_text("one two three\n\none\n")
    assert run("stats", folder, "--text", text, "--gradients", "-o", out).code == 0
    seen = load_file(out)
    assert "model.layers.0.self_attn.q_proj.in_diag" in seen
    layer = llama.model.layers[0]
    tokens = torch.tensor([1, 2, 3, 1])  # without the padding
    inputs = layer.input_layernorm(llama.model.embed_tokens(tokens)).detach().numpy()
    assert np.allclose(seen["model.layers.0.self_attn.q_proj.in_diag"], (inputs**2).mean(0), rtol=1e-5)
    assert seen["model.layers.0.mlp.down_proj.out_diag"].shape == (8,)
    short = run("stats", folder, "--text", text, "--length", "1", "-o", tmp_path / "short.safetensors", "--json")
    assert json.loads(short.out)["total"]["modules"] == 8
