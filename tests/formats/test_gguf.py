"""The official gguf package reads what we write; names, row order and scale are llama.cpp's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratools as lt
from loratools.core.adapter import Adapter, Meta
from loratools.errors import ConversionError, FormatError, LoratoolsError, NeedsBaseError, UnsupportedError
from loratools.formats.base import FORMATS
from loratools.formats.trees import GGUF, Heads, interleaving
from loratools.io.base import Base
from loratools.kinds.lowrank import LowRank
from loratools.linalg.namespace import to_numpy

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
LLAMA = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}


def base(**config: Any) -> Base:
    return Base({}, config={**LLAMA, **config})


def adapter(scales: dict[str, float], ranks: dict[str, int] | None = None, dtype: Any = np.float32) -> Adapter:
    rng = np.random.default_rng(0)
    shapes = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "mlp.down_proj": (32, 48)}
    updates = {}
    for module, scale in scales.items():
        out, width = shapes[module]
        r = (ranks or {}).get(module, 4)
        b, a = rng.standard_normal((out, r)).astype(dtype), rng.standard_normal((r, width)).astype(dtype)
        updates[f"model.layers.1.{module}.weight"] = LowRank(b, a, scale)
    return Adapter(updates, Meta())


def test_the_official_reader_finds_what_llama_cpp_demands(tmp_path: Path) -> None:
    source = adapter({"self_attn.q_proj": 2.0, "self_attn.k_proj": 2.0, "mlp.down_proj": 2.0})
    path = lt.save(source, tmp_path / "x.gguf", format="gguf", base=base())
    reader = gguf.GGUFReader(path)
    said = {name: field.contents() for name, field in reader.fields.items()}
    assert (said["general.type"], said["adapter.type"], said["general.architecture"]) == ("adapter", "lora", "llama")
    assert reader.fields["adapter.lora.alpha"].types == [gguf.GGUFValueType.FLOAT32]
    assert said["adapter.lora.alpha"] == 8.0
    names = {t.name for t in reader.tensors}
    assert names == {f"blk.1.{m}.weight.lora_{x}" for m in ("attn_q", "attn_k", "ffn_down") for x in "ab"}
    down = {t.name: t.data for t in reader.tensors}
    assert np.array_equal(down["blk.1.ffn_down.weight.lora_a"], source["model.layers.1.mlp.down_proj.weight"].a)


def test_q_and_k_are_permuted_as_llama_cpp_permutes_the_base(tmp_path: Path) -> None:
    """The update in the file is the permuted update: the formula of convert_hf_to_gguf, written down independently."""
    source = adapter({"self_attn.q_proj": 1.0, "self_attn.k_proj": 1.0})
    path = lt.save(source, tmp_path / "x.gguf", format="gguf", base=base())
    held = {t.name: np.array(t.data) for t in gguf.GGUFReader(path).tensors}
    for module, stem, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2)):
        w = source[f"model.layers.1.self_attn.{module}.weight"].dense()
        wanted = w.reshape(heads, 2, w.shape[0] // heads // 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
        got = held[f"blk.1.{stem}.weight.lora_b"] @ held[f"blk.1.{stem}.weight.lora_a"]
        assert np.allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize(
    ("scales", "ranks"),
    [
        ({"self_attn.q_proj": 0.5, "mlp.down_proj": 0.5}, None),
        ({"self_attn.q_proj": 0.5, "mlp.down_proj": 2.0}, None),
        ({"self_attn.q_proj": 1.5, "mlp.down_proj": 1.5}, {"mlp.down_proj": 2}),
    ],
    ids=["one-alpha", "two-scales", "two-ranks"],
)
def test_there_and_back(scales: dict[str, float], ranks: dict[str, int] | None, dtype: str, tmp_path: Path) -> None:
    source = adapter(scales, ranks)
    path = lt.save(source, tmp_path / "x.gguf", format="gguf", base=base(), dtype=dtype)
    back = lt.load(path, base=base_with_names())
    assert set(back) == set(source)
    tolerance = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}[dtype]  # two roundings of the factors
    for name, u in source.items():
        assert np.abs(back[name].dense() - u.dense()).max() <= tolerance * np.abs(u.dense()).max()


def base_with_names() -> Base:
    shapes = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "mlp.down_proj": (32, 48)}
    weights = {f"model.layers.1.{m}.weight": np.zeros(s, np.float32) for m, s in shapes.items()}
    opened = Base.open(weights)
    opened.config = LLAMA
    return opened


def test_without_the_head_counts_names_stay_and_nothing_is_lost(tmp_path: Path) -> None:
    path = lt.save(adapter({"self_attn.q_proj": 2.0}), tmp_path / "x.gguf", format="gguf", base=base())
    plain = lt.load(path)
    assert list(plain) == ["blk.1.attn_q.weight"]
    again = lt.save(plain, tmp_path / "y.gguf")
    assert again.read_bytes() == path.read_bytes()
    with pytest.raises(LoratoolsError, match="--base"):
        lt.save(plain, tmp_path / "p", format="peft")


def test_native_keeps_a_gguf_file_byte_for_byte(tmp_path: Path) -> None:
    path = lt.save(adapter({"mlp.down_proj": 2.0}), tmp_path / "x.gguf", format="gguf", base=base())
    native = lt.save(lt.load(path), tmp_path / "n.safetensors", format="native")
    assert lt.save(lt.load(native), tmp_path / "y.gguf", format="gguf").read_bytes() == path.read_bytes()


def test_tables_agree_with_the_official_name_map() -> None:
    for model_type, tree in GGUF.items():
        arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == tree.arch)
        names = gguf.get_tensor_name_map(arch, 3)
        for module, stem in tree.modules.items():
            assert names.get_name(f"{tree.block}.2.{module}") == f"blk.2.{stem}", (model_type, module)
        for module, stem in tree.outer.items():
            if stem != "output" or tree.arch not in ("gemma", "gemma2", "gemma3"):
                assert names.get_name(module) == stem, (model_type, module)


def test_interleaving_is_a_permutation_of_whole_heads() -> None:
    order = interleaving(GGUF["llama"], "blk.0.attn_k", 16, Heads(4, 2))
    assert order is not None
    assert sorted(order) == list(range(16))
    assert order[:4] == [0, 4, 1, 5]
    assert interleaving(GGUF["qwen2"], "blk.0.attn_k", 16, None) is None
    with pytest.raises(NeedsBaseError):
        interleaving(GGUF["llama"], "blk.0.attn_k", 16, None)


def test_what_llama_cpp_cannot_hold_is_refused(tmp_path: Path) -> None:
    source = adapter({"mlp.down_proj": 1.0})
    with pytest.raises(UnsupportedError, match="falcon"):
        FORMATS["gguf"].encode(source, base=base(model_type="falcon"))
    with pytest.raises(NeedsBaseError):
        FORMATS["gguf"].encode(source)
    head = Adapter({"lm_head.weight": LowRank(np.ones((61, 1)), np.ones((1, 32)))}, Meta())
    with pytest.raises(ConversionError, match="ties"):
        FORMATS["gguf"].encode(head, base=base(tie_word_embeddings=True))


def test_embeddings_are_laid_out_as_llama_cpp_reads_them() -> None:
    u = LowRank(np.ones((61, 2), np.float32), np.ones((2, 32), np.float32))
    bundle = FORMATS["gguf"].encode(Adapter({"model.embed_tokens.weight": u}, Meta()), base=base())
    shapes = {k: tuple(t.shape) for k, t in bundle.tensors.items()}
    assert shapes == {"token_embd.weight.lora_a": (61, 2), "token_embd.weight.lora_b": (32, 2)}


@pytest.mark.parametrize("cut", [4, 12, 60, 200, 400])
def test_a_damaged_file_is_one_clear_error(cut: int, tmp_path: Path) -> None:
    path = lt.save(adapter({"mlp.down_proj": 1.0}), tmp_path / "x.gguf", format="gguf", base=base())
    short = tmp_path / "short.gguf"
    short.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(FormatError, match="damaged"):
        lt.load(short)


def test_a_model_is_no_adapter(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_type("model")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(LoratoolsError, match="a GGUF model, not a LoRA adapter"):
        lt.load(tmp_path / "m.gguf")


def test_quantised_factors_are_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((32, 64)).astype(np.float32), rng.standard_normal((64, 32)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "qwen2")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 64.0)
    for name, x in (("lora_a", a), ("lora_b", b)):
        writer.add_tensor(f"blk.0.ffn_up.weight.{name}", gguf.quants.quantize(x, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = lt.load(tmp_path / "q.gguf")
    assert list(read) == ["model.layers.0.mlp.up_proj.weight"]
    u = read["model.layers.0.mlp.up_proj.weight"]
    assert u.scale == 2.0
    assert np.abs(to_numpy(u.a) - a).max() <= np.abs(a).max() / 127  # one step of Q8_0
    assert any("fp32" in remark for remark in read.meta.remarks)


def test_invocation_tokens_travel(make: Callable[..., Any], tmp_path: Path) -> None:
    made = make("llama", target_modules=["v_proj"], r=2)
    loaded = lt.load(made.folder)
    from dataclasses import replace

    told = replace(loaded, meta=replace(loaded.meta, config={**loaded.meta.config, "alora_invocation_tokens": [5, 6]}))
    path = lt.save(told, tmp_path / "x.gguf", format="gguf", base=base())
    field = gguf.GGUFReader(path).fields["adapter.alora.invocation_tokens"]
    assert field.contents() == [5, 6]
    assert field.types[-1] == gguf.GGUFValueType.UINT32
