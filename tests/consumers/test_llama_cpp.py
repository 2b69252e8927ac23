"""llama.cpp itself: a tiny model runs with our adapters; what it refuses, ignores or applies is what the verdicts say.

Slow, and only where the package xllamacpp (llama.cpp as a wheel) is installed: ``pip install xllamacpp``, then
``pytest -m slow tests/consumers/test_llama_cpp.py``. Every run is a process of its own, for a failed load may end it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratools as lt
from loratools.consumers.subject import read
from loratools.io.base import Base
from loratools.io.gguf import write_gguf
from loratools.io.read import open_bundle
from loratools.ops.check import check, judged
from loratools.ops.fix import fix

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
if importlib.util.find_spec("xllamacpp") is None:
    pytest.skip("xllamacpp is not installed", allow_module_level=True)
torch = pytest.importorskip("torch", reason="torch is not installed")
pytestmark = pytest.mark.slow

FOREIGN = "llama.cpp/format"  # a PEFT directory is no GGUF: true of all of them
PROMPT = [3, 5, 7, 9, 11, 13]
RUN = """
import json, sys
import xllamacpp as x
model, adapter, prompt, count = json.loads(sys.argv[1])
p = x.CommonParams()
p.model.path, p.n_ctx, p.n_parallel, p.warmup, p.verbosity = model, 64, 1, False, -1
p.cache_type_k = p.cache_type_v = x.ggml_type.GGML_TYPE_F32
if adapter:
    p.lora_adapters = [x.CommonAdapterLoraInfo(adapter, 1.0)]
asked = {"prompt": prompt, "max_tokens": 1, "logprobs": count, "temperature": 1.0}
said = x.Server(p).handle_completions(asked)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
print("LOGPROBS", json.dumps({row["id"]: row["logprob"] for row in said}))
"""
PLACES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


@pytest.fixture(scope="session")
def model(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as GGUF, with a vocabulary of made-up words."""
    path, c = tmp_path_factory.mktemp("gguf") / "model.gguf", llama.config
    w = gguf.GGUFWriter(path, "llama")
    w.add_context_length(64)
    w.add_embedding_length(c.hidden_size)
    w.add_block_count(c.num_hidden_layers)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_rope_dimension_count(c.hidden_size // c.num_attention_heads)
    w.add_rope_freq_base(10000.0)
    w.add_vocab_size(c.vocab_size)
    w.add_tokenizer_model("llama")
    w.add_token_list(["<unk>", "<s>", "</s>", *(f"\u2581t{i}" for i in range(c.vocab_size - 3))])
    w.add_token_scores([0.0] * c.vocab_size)
    w.add_token_types([2, 3, 3, *[1] * (c.vocab_size - 3)])
    w.add_add_bos_token(False)
    for name, tensor in llama.weights.items():
        place, array = _place(name), tensor.float().numpy()
        heads = {"attn_q": c.num_attention_heads, "attn_k": c.num_key_value_heads}.get(place.split(".")[-2])
        w.add_tensor(place, np.ascontiguousarray(_rotated(array, heads) if heads else array))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def _place(name: str) -> str:
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    module = name.removesuffix(".weight")
    if module in whole:
        return f"{whole[module]}.weight"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{PLACES[part]}.weight"


def _rotated(w: Any, heads: int) -> Any:
    """Return the rows as llama.cpp's rotary layout wants them: the halves of each head alternate."""
    out, width = w.shape
    return w.reshape(heads, 2, out // heads // 2, width).swapaxes(1, 2).reshape(out, width)


def ran(model: Path, adapter: Path | None, count: int) -> Any:
    """Return the log-probabilities of the next word, or None where llama.cpp does not load the adapter."""
    asked = json.dumps([str(model), None if adapter is None else str(adapter), PROMPT, count])
    done = subprocess.run([sys.executable, "-c", RUN, asked], capture_output=True, text=True, check=False, cwd="/")
    lines = [line for line in done.stdout.splitlines() if line.startswith("LOGPROBS")]
    if not lines:
        assert done.returncode != 0
        return None
    said = json.loads(lines[0].removeprefix("LOGPROBS"))
    assert len(said) == count
    return np.array([said[str(i)] for i in range(count)])


def reference(llama: Any, model: Any) -> Any:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPT])).logits[0, -1].double()
    return torch.log_softmax(logits, 0).numpy()


def with_adapter(llama: Any, folder: Path) -> Any:
    import peft

    return reference(llama, peft.PeftModel.from_pretrained(llama.fresh(), folder).eval())


def near(got: Any, wanted: Any, untouched: Any) -> bool:
    """True within a fiftieth of the adapter's effect: llama.cpp's exponentials are good to a few in ten thousand."""
    return bool(np.abs(got - wanted).max() <= 0.02 * np.abs(wanted - untouched).max())


def test_the_model_is_the_same_one(llama: Any, model: Path) -> None:
    got, wanted = ran(model, None, llama.config.vocab_size), reference(llama, llama.fresh())
    assert np.abs(got - wanted).max() < 1e-3


OPTIONS: list[Any] = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    {"target_modules": ["k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]},
    {"target_modules": ["lm_head", "q_proj"]},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "rslora", "patterns", "others", "head"])
@pytest.mark.parametrize("consumer", ["llama.cpp", "ollama"])
def test_what_fix_writes_gives_pefts_output(
    consumer: str, options: Any, llama: Any, model: Path, tmp_path: Path
) -> None:
    llama.adapter(tmp_path / "a", **{"lora_alpha": 32, **options})
    fix(read(tmp_path / "a", base=Base.open(llama.base)), consumer, tmp_path / "a.gguf")
    assert check(tmp_path / "a.gguf", consumer, base=llama.base).checks[0]["ok"]
    count = llama.config.vocab_size
    untouched, wanted = reference(llama, llama.fresh()), with_adapter(llama, tmp_path / "a")
    assert np.abs(wanted - untouched).max() > 0.05
    assert near(ran(model, tmp_path / "a.gguf", count), wanted, untouched)


FAULTS: dict[str, Any] = {
    "types": lambda t, m: (t, m | {"general.type": "model"}),
    "suffix": lambda t, m: (t | {"blk.0.attn_q.bias": next(iter(t.values()))}, m),
    "half-pairs": lambda t, m: (dict(list(t.items())[1:]), m),
    "architecture": lambda t, m: (t, m | {"general.architecture": "qwen2"}),
    "norms": lambda t, m: (t | {"blk.0.attn_norm.weight": next(iter(t.values()))}, m),
    "missing-modules": lambda t, m: ({k.replace("blk.1.", "blk.7."): x for k, x in t.items()}, m),
    "prefix-drift": lambda t, m: ({k.replace("blk.", "block."): x for k, x in t.items()}, m),
    "wrong-base": lambda t, m: (t | {"blk.1.ffn_down.weight.lora_b": t["blk.1.ffn_down.weight.lora_b"].rows(0, 16)}, m),
    "shapes": lambda t, m: (t | {"blk.0.attn_q.weight.lora_a": t["blk.0.attn_q.weight.lora_a"].rows(0, 2)}, m),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults(name: str, llama: Any, model: Path, tmp_path: Path) -> None:
    """`would not load` if and only if llama.cpp does not; what it ignores changes nothing."""
    llama.adapter(tmp_path / "a")
    base, count = Base.open(llama.base), llama.config.vocab_size
    fix(read(tmp_path / "a", base=base), "llama.cpp", tmp_path / "a.gguf")
    bundle = open_bundle(tmp_path / "a.gguf")
    tensors, metadata = FAULTS[name](dict(bundle.tensors), dict(bundle.metadata))
    write_gguf(tmp_path / "b.gguf", tensors, metadata)
    found = {f.id.partition("/")[2]: f for f in judged(read(tmp_path / "b.gguf", base=base), "llama.cpp")}
    if name != "types":  # then it is no adapter at all, says another rule
        assert name in found
    got = ran(model, tmp_path / "b.gguf", count)
    assert (got is None) == any(f.effect == "would not load" for f in found.values())
    if got is not None:
        assert np.abs(got - ran(model, tmp_path / "a.gguf", count)).max() < 1e-5


@pytest.mark.parametrize("alpha", [0.0, 16.0, 64.0])
def test_the_scale_is_alpha_over_rank_and_1_for_0(alpha: float, llama: Any, model: Path, tmp_path: Path) -> None:
    llama.adapter(tmp_path / "a")
    fix(read(tmp_path / "a", base=Base.open(llama.base)), "llama.cpp", tmp_path / "a.gguf")
    bundle = open_bundle(tmp_path / "a.gguf")
    write_gguf(tmp_path / "b.gguf", bundle.tensors, {**bundle.metadata, "adapter.lora.alpha": json.dumps(alpha)})
    lt.save(lt.load(tmp_path / "b.gguf", base=llama.base), tmp_path / "b", format="peft")
    untouched, wanted = reference(llama, llama.fresh()), with_adapter(llama, tmp_path / "b")
    assert near(ran(model, tmp_path / "b.gguf", llama.config.vocab_size), wanted, untouched)


CONVERTER = Path(os.environ.get("LORATOOLS_LLAMA_CPP", "")) / "convert_lora_to_gguf.py"
MADE: dict[str, Any] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    "dora": {"use_dora": True},
    "saved": {"modules_to_save": ["lm_head"]},
    "norms": {"modules_to_save": ["norm", "input_layernorm"]},
    "bias": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "tokens": {"trainable_token_indices": [1, 2]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "another layer": {},
}


@pytest.mark.skipif(not CONVERTER.is_file(), reason="LORATOOLS_LLAMA_CPP names no llama.cpp checkout")
@pytest.mark.parametrize("name", MADE)
def test_the_converter(name: str, llama: Any, model: Path, plant: Any, tmp_path: Path) -> None:
    """Where it stops we say so; where it does not, what comes out has the strength that we say."""
    llama.adapter(tmp_path / "a", **{"lora_alpha": 32, **MADE[name]})
    if name == "another layer":
        plant(tmp_path / "a", tensors=lambda t: {k.replace("layers.1.", "layers.7."): x for k, x in t.items()})
    found = {
        f.effect for f in judged(read(tmp_path / "a", base=Base.open(llama.base)), "llama.cpp") if FOREIGN not in f.id
    }
    words = [sys.executable, str(CONVERTER), str(tmp_path / "a"), "--base", str(llama.base), "--outtype", "f32"]
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join([str(CONVERTER.parent / "gguf-py"), *sys.path])}
    out = tmp_path / "a.gguf"
    done = subprocess.run([*words, "--outfile", str(out)], capture_output=True, text=True, check=False, env=paths)
    assert (done.returncode != 0) == ("would not load" in found), done.stderr[-500:]
    if done.returncode:
        return
    untouched, wanted = reference(llama, llama.fresh()), with_adapter(llama, tmp_path / "a")
    right = near(ran(model, out, llama.config.vocab_size), wanted, untouched)
    assert right == (not found)
