"""What all types but LORA share: spellings of keys, biases and saved modules, fields of the config, shapes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loratools as lt
from loratools.errors import FormatError, MismatchError, MissingScaleError, NeedsBaseError
from loratools.formats.peft.tuner_keys import parser
from loratools.kinds.rebased import Rebased

torch = pytest.importorskip("torch", reason="torch is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")


def rewritten(folder: Path, *, keys: Callable[[str], str] | None = None, **fields: Any) -> None:
    """Rename the tensors of an adapter, and change fields of its config; None takes one out."""
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if keys is not None:
        save_file({keys(key): t for key, t in load_file(weights).items()}, weights)
    said = {**json.loads(config.read_text()), **fields}
    config.write_text(json.dumps({k: v for k, v in said.items() if v is not None}))


def same(told: dict[str, Any], before: dict[str, Any]) -> None:
    assert list(told) == list(before)
    assert all(np.array_equal(told[name], before[name]) for name in told)


@pytest.mark.parametrize(
    ("key", "path", "leaf", "adapter"),
    [
        ("base_model.model.a.b.hada_w1_a", "a.b", "hada_w1_a", None),
        ("base_model.model.a.b.hada_w1_a.default", "a.b", "hada_w1_a", "default"),
        ("a.b.hada_w1_a", "a.b", "hada_w1_a", None),
        ("base_model.model._orig_mod.a.oft_R.weight", "a", "oft_R.weight", None),
        ("base_model.model.a.oft_R.mine.weight", "a", "oft_R.weight", "mine"),
        ("base_model.vera_A", "", "vera_A", None),
        ("base_model.vera_A.default", "", "vera_A", "default"),
        ("base_model.tinylora_v.3", "", "tinylora_v.3", None),
        ("base_model.tinylora_v.default.3", "", "tinylora_v.3", "default"),
        ("base_model.model.a.b.weight", "a.b.weight", "", None),
        ("base_model.model.vera_A.weight", "vera_A.weight", "", None),  # a module of that name
    ],
)
def test_keys_are_split(key: str, path: str, leaf: str, adapter: str | None) -> None:
    parse = parser(("hada_w1_a", "oft_R.weight", "vera_A", "tinylora_v.*"))
    assert parse(key) == (path, leaf, adapter)


@pytest.mark.parametrize(
    ("config", "fields"),
    [("LoHaConfig", {"r": 3}), ("VeraConfig", {"r": 3}), ("TinyLoraConfig", {"r": 2, "u": 3})],
)
def test_an_adapter_name_left_in_the_keys_is_taken_out_and_told(
    oracle: Callable[..., Any], config: str, fields: dict[str, Any]
) -> None:
    made = oracle(config, ("down", "up"), **fields)
    plain = made.read_changes()

    def named(key: str) -> str:
        head, _, last = key.rpartition(".")
        return f"{head}.mine.{last}" if last.isdigit() else f"{key}.mine"

    rewritten(made.folder, keys=named)
    same(made.read_changes(), plain)
    assert any("'mine'" in remark for remark in made.read().meta.remarks)
    rewritten(made.folder, keys=lambda key: key.replace("mine", "other") if "down" in key else key)
    with pytest.raises(FormatError, match="several adapters"):
        made.read()


def test_saved_modules_and_biases_come_along(oracle: Callable[..., Any], tmp_path: Path) -> None:
    made = oracle("VeraConfig", ("down", "up"), r=3, bias="vera_only")
    assert {name for name, u in made.read().items() if u.kind == "replace"} == {"down.bias", "up.bias"}
    told, true = made.read_changes(), made.changes()
    for name, d in true.items():
        assert np.abs(told[name] - d).max() <= 5e-7 * max(np.abs(d).max(), 0.1)


def test_a_saved_module_beside_a_type(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"body": torch.nn.Linear(6, 8), "head": torch.nn.Linear(8, 4)})
    base = {name: t.detach().clone().numpy() for name, t in model.state_dict().items()}
    adapted = peft.get_peft_model(model, peft.LoHaConfig(r=2, target_modules=["body"], modules_to_save=["head"]))
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(0.1)
    adapted.save_pretrained(tmp_path / "a")
    found = lt.load(tmp_path / "a", base=base)
    merged = adapted.merge_and_unload().state_dict()
    assert set(found) == {"body.weight", "head.weight", "head.bias"}
    for name, u in found.items():
        assert np.abs(u.apply(base[name]) - merged[name].numpy()).max() <= 1e-6


def test_a_whole_base_beside_the_update_rebases_it(oracle: Callable[..., Any]) -> None:
    made = oracle("LoHaConfig", ("down",), r=2)
    weights = made.folder / "adapter_model.safetensors"
    whole = np.ones((24, 36), np.float32)
    save_file({**load_file(weights), "base_model.model.down.base_layer.weight": whole}, weights)
    u = made.read()["down.weight"]
    assert isinstance(u, Rebased)
    assert np.array_equal(u.apply(made.base["down.weight"]), u.apply(whole))


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("alpha", None, MissingScaleError),
        ("alpha", "8", FormatError),
        ("alpha_pattern", {"down": "x"}, FormatError),
        ("alpha_pattern", [1], FormatError),
        ("fan_in_fan_out", "yes", FormatError),
        ("bias", "some", FormatError),
    ],
)
def test_wrong_fields_are_refused_by_name(
    oracle: Callable[..., Any], field: str, value: Any, error: type[Exception]
) -> None:
    made = oracle("LoHaConfig", ("down",), r=2)
    if field == "bias":  # is looked at where there is one
        rewritten(made.folder, keys=lambda key: key)
        weights = made.folder / "adapter_model.safetensors"
        save_file({**load_file(weights), "base_model.model.down.bias": np.zeros(24, np.float32)}, weights)
    rewritten(made.folder, **{field: value})
    with pytest.raises(error, match=field):
        made.read()


def test_patterns_name_modules(oracle: Callable[..., Any]) -> None:
    made = oracle("LoHaConfig", ("down", "up"), r=2, alpha=2, rank_pattern={"down": 4}, alpha_pattern={"down": 12})
    found = made.read()
    assert (found["down.weight"].scale, found["up.weight"].scale) == (3.0, 1.0)


def test_tensors_that_do_not_fit_the_base_are_refused(oracle: Callable[..., Any]) -> None:
    made = oracle("LoHaConfig", ("down",), r=2)
    with pytest.raises(MismatchError, match="does not fit"):
        lt.load(made.folder, base={"down.weight": np.zeros((24, 30), np.float32)})
    with pytest.raises(MismatchError):
        lt.load(made.folder, base={"elsewhere.weight": np.zeros((24, 36), np.float32)})


def test_shapes_are_asked_for_with_the_reason(oracle: Callable[..., Any]) -> None:
    made = oracle("FourierFTConfig", ("down",), n_frequency=5)
    with pytest.raises(NeedsBaseError, match="header is enough"):
        made.read(base=False)


def test_directions_that_adalora_pruned_are_gone(oracle: Callable[..., Any]) -> None:
    """PEFT divides by init_r + 1e-5 whatever is left, and saves a module without a rank as empty tensors."""
    made = oracle("AdaLoraConfig", ("down", "up"), init_r=4, lora_alpha=8, total_step=10)
    weights = made.folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    cut = {
        key: t[:, keep] if "lora_B" in key else t[keep]
        for key, t in tensors.items()
        for keep in [[0, 2] if ".down." in key else []]
    }
    save_file({key: np.ascontiguousarray(t) for key, t in cut.items()}, weights)
    found = made.read()
    assert list(found) == ["down.weight"]
    a, e, b = (cut[f"base_model.model.down.lora_{x}"].astype(np.float64) for x in "AEB")
    told = found["down.weight"].dense()
    assert np.abs(told - 8 / (4 + 1e-5) * b @ (a * e)).max() <= 1e-6 * np.abs(told).max()


def test_bone_is_miss_under_its_older_name(oracle: Callable[..., Any]) -> None:
    made = oracle("MissConfig", ("down",), r=5)
    plain = made.read_changes()
    rewritten(made.folder, keys=lambda key: key.replace("miss_block", "bone_block"), peft_type="BONE")
    same(made.read_changes(), plain)


def test_every_type_of_peft_is_in_the_docs() -> None:
    text = (Path(__file__).parents[3] / "docs/formats/peft.md").read_text()
    assert [name for name in peft.PeftType.__members__ if f"`{name}`" not in text and name != "LORA"] == []


@pytest.mark.parametrize(
    ("config", "fields"),
    [("FourierFTConfig", {"n_frequency": 9}), ("RandLoraConfig", {"r": 8}), ("VeraConfig", {"r": 3})],
)
def test_conv1d_and_linear_side_by_side_are_told_by_the_class_of_the_model(
    config: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    """The flag of the config is for all modules, and the last of them decides it; sizes tell little or nothing."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"vocab_size": 40, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 8, "tie_word_embeddings": False}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**small))
    model.save_pretrained(tmp_path / "base")
    before = {name: t.detach().clone().numpy() for name, t in model.state_dict().items()}
    said = getattr(peft, config)(target_modules=["attn.c_attn", "attn.c_proj", "lm_head"], **fields)
    adapted = peft.get_peft_model(model, said)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape) * 0.3)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    found = lt.load(tmp_path / "adapter", base=tmp_path / "base")
    merged = adapted.merge_and_unload().state_dict()
    assert len(found) == 3
    for name, u in found.items():
        d = merged[name].double().numpy() - before[name]
        assert np.abs(u.dense() - d).max() <= 1e-6 * max(np.abs(d).max(), 0.2), name
