"""LORA files whose config and tensors disagree, or whose keys are spelled otherwise: told, refused by name, or read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loratools as lt
from loratools.errors import FormatError, MismatchError, UnsupportedError
from loratools.linalg.namespace import to_numpy

PREFIX = "base_model.model."
Arrays = dict[str, np.ndarray[Any, Any]]


def random(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def config(**said: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"], **said}


def factors(path: str = "q", out: int = 10, width: int = 12, rank: int = 4) -> Arrays:
    return {
        f"{PREFIX}{path}.lora_A.weight": random(rank, width),
        f"{PREFIX}{path}.lora_B.weight": random(out, rank),
    }


def plain(**named: np.ndarray[Any, Any]) -> Arrays:
    return {PREFIX + name: t for name, t in named.items()}


def told(adapter: lt.Adapter, words: str) -> bool:
    return any(words in remark for remark in adapter.meta.remarks)


def reread(adapter: lt.Adapter, folder: Path) -> tuple[Arrays, dict[str, Any]]:
    out = lt.save(adapter, folder / "out", overwrite=True)
    return load_file(out / "adapter_model.safetensors"), json.loads((out / "adapter_config.json").read_text())


# use_dora and the magnitudes


def test_use_dora_without_magnitudes_is_told_and_mended(tmp_path: Path) -> None:
    adapter = lt.from_state_dict(factors() | factors("k"), config(use_dora=True))
    assert {u.kind for u in adapter.values()} == {"lowrank"}
    assert told(adapter, "use_dora is true, but 2 of 2 modules have no magnitude, the first q")
    assert reread(adapter, tmp_path)[1]["use_dora"] is False


def test_magnitudes_without_use_dora_are_told_and_mended(tmp_path: Path) -> None:
    coat = plain(**{"q.lora_magnitude_vector": np.ones(10, np.float32)})
    for said in ({}, {"use_dora": False}):
        adapter = lt.from_state_dict(factors() | coat, config(**said))
        assert adapter["q.weight"].kind == "dora"
        assert told(adapter, "1 of 1 modules have magnitudes")
        assert reread(adapter, tmp_path)[1]["use_dora"] is True
    assert not lt.from_state_dict(factors() | coat, config(use_dora=True)).meta.remarks


@pytest.mark.parametrize("magnitudes", [False, True])
def test_what_peft_does_where_the_flag_is_wrong(
    make: Callable[..., Any], reload: Callable[..., Any], magnitudes: bool
) -> None:
    """The remarks say what PEFT does: it ignores magnitudes, or takes the norms of the base's rows in their place."""
    made = make("llama", r=4, lora_alpha=8, target_modules=["q_proj"], use_dora=True)
    file, said = made.folder / "adapter_model.safetensors", made.folder / "adapter_config.json"
    if magnitudes:
        said.write_text(json.dumps(json.loads(said.read_text()) | {"use_dora": False}))
    else:
        save_file({k: t for k, t in load_file(file).items() if "magnitude" not in k}, file)
    merged = reload(made, made.folder).merge_and_unload().state_dict()
    for name, u in lt.load(made.folder).items():
        w = made.weights[name]
        v = w + to_numpy((u.direction if magnitudes else u).dense())  # type: ignore[attr-defined]
        norms = np.linalg.norm(w, axis=1, keepdims=True) / np.linalg.norm(v, axis=1, keepdims=True)
        expected = v if magnitudes else norms * v
        assert np.abs(merged[name].numpy() - expected).max() <= 2e-6 * max(
            np.abs(expected).max(), 1.0
        )  # fp32 roundings


# what the operations left


def test_two_squeezes_leave_two_lines(tmp_path: Path) -> None:
    first = lt.save(lt.squeeze(lt.from_state_dict(factors(), config()), rank=3), tmp_path / "a")
    second = lt.save(lt.squeeze(lt.load(first), rank=2), tmp_path / "b")
    lines = lt.load(second).meta.history
    assert [line.split()[0] for line in lines] == ["squeeze", "squeeze"]
    assert lines[0] != lines[1]
    assert json.loads(lt.info(lt.load(second)).to_json())["history"] == list(lines)
    assert (second / "README.md").read_text().count("- squeeze") == 2


# the config


def test_an_alpha_beyond_every_float_is_refused() -> None:
    for said in ({"lora_alpha": 10**400}, {"alpha_pattern": {"q": -(10**400)}}):
        with pytest.raises(FormatError, match="is no number"):
            lt.from_state_dict(factors(), config(**said))


@pytest.mark.parametrize("name", [5, {"a": 1}, ["x"], True])
def test_a_base_that_is_not_named_by_a_string(name: object) -> None:
    adapter = lt.from_state_dict(factors(), config(base_model_name_or_path=name))
    assert adapter.meta.base_id is None
    assert told(adapter, "base_model_name_or_path is no name")


def test_kasa_is_called_by_its_name(tmp_path: Path) -> None:
    adapter = lt.from_state_dict(factors(), config(kasa_config={"beta": 0.1}))
    assert told(adapter, "KaSA (kasa_config) changed the base")
    assert not told(adapter, "init_lora_weights")
    again = lt.load(lt.save(lt.squeeze(adapter, rank=1), tmp_path / "out"))
    assert told(again, "KaSA (kasa_config) changed the base")


@pytest.mark.parametrize("init", ["loftq", "pissa", "olora", "corda"])
def test_an_initialisation_that_changed_the_base_is_told_for_ever(init: str, tmp_path: Path) -> None:
    adapter = lt.from_state_dict(factors(), config(init_lora_weights=init))
    again = lt.load(lt.save(lt.squeeze(adapter, rank=1), tmp_path / "out"))
    assert again.meta.config["init_lora_weights"] is True
    for one in (adapter, again):
        assert told(one, f"init_lora_weights='{init}' changed the base when training began")


def test_a_missing_type_is_called_missing() -> None:
    for said in ({"peft_type": None}, {}):
        bare = {k: v for k, v in config().items() if k != "peft_type"} | said
        with pytest.raises(FormatError, match="does not say peft_type") as caught:
            lt.from_state_dict(factors(), bare)
        assert not isinstance(caught.value, UnsupportedError)


def test_a_missing_config_is_asked_for_where_it_belongs(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no config with the tensors") as caught:
        lt.from_state_dict(factors())
    assert caught.value.hint == "pass config=..."
    save_file(factors(), tmp_path / "adapter_model.safetensors")
    with pytest.raises(FormatError, match="beside the weights") as caught:
        lt.load(tmp_path / "adapter_model.safetensors")
    assert "copy it there" in str(caught.value.hint)


def test_ranks_that_disagree_are_told_once_per_pair_of_ranks() -> None:
    many = {k: t for i in range(60) for k, t in factors(f"l.{i}.q").items()} | factors("k", rank=2)
    adapter = lt.from_state_dict(many, config(r=8))
    lines = [remark for remark in adapter.meta.remarks if "the config says rank" in remark]
    assert len(lines) == 2
    assert lines[0].startswith("60 modules, the first l.0.q: the config says rank 8, the tensors have 4; scale 2 ")
    assert lines[1].startswith("k: the config says rank 8, the tensors have 2; scale 4 ")


# tensors


@pytest.mark.parametrize("dtype", ["int8", "bool", "complex64", "int64", "uint8"])
@pytest.mark.parametrize("leaf", ["lora_A.weight", "lora_B.weight"])
def test_factors_of_no_floating_dtype_are_refused_by_name(leaf: str, dtype: str) -> None:
    key = f"{PREFIX}q.{leaf}"
    tensors = factors()
    with pytest.raises(FormatError, match="not of a floating dtype") as caught:
        lt.from_state_dict(tensors | {key: tensors[key].astype(dtype)}, config())
    assert caught.value.parameter == "q"
    assert caught.value.got == f"{key} of {dtype}"


@pytest.mark.parametrize("length", [1, 4, 12])
def test_a_bias_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(FormatError, match="does not fit lora_B"):
        lt.from_state_dict(factors() | plain(**{"q.lora_B.bias": np.ones(length, np.float32)}), config(lora_bias=True))


@pytest.mark.parametrize("shape", [(), (9,), (2, 5), (1, 12)])
def test_a_magnitude_of_another_size_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(FormatError, match="magnitude does not fit"):
        lt.from_state_dict(factors() | plain(**{"q.lora_magnitude_vector": np.ones(shape, np.float32)}), config())


def test_saved_modules_without_elements_are_refused() -> None:
    saved = plain(**{"score.weight": np.ones((0,), np.float32)})
    with pytest.raises(FormatError, match="no elements") as caught:
        lt.from_state_dict(factors() | saved, config(modules_to_save=["score"]))
    assert "without gathering its shards" in str(caught.value.hint)


def test_a_resized_embedding_is_a_replacement_without_a_word_in_the_config(tmp_path: Path) -> None:
    tables = plain(**{"model.embed_tokens.weight": random(9, 6), "lm_head.weight": random(9, 6)})
    adapter = lt.from_state_dict(factors() | tables, config())
    assert {n: u.kind for n, u in adapter.items()} == {
        "q.weight": "lowrank", "model.embed_tokens.weight": "replace", "lm_head.weight": "replace",
    }  # fmt: skip
    old = {"q.weight": np.zeros((10, 12), np.float32), "model.embed_tokens.weight": random(7, 6)}
    with_base = lt.from_state_dict(factors() | tables, config(), base=old)
    assert np.array_equal(with_base["model.embed_tokens.weight"].apply(None), random(9, 6))
    tensors, said = reread(adapter, tmp_path)
    assert tensors.keys() == (factors() | tables).keys()
    assert said == config()


def test_factors_and_the_stored_weight_of_one_module(tmp_path: Path) -> None:
    """The file's own weight counts, and the factors go on top of it."""
    stored = random(10, 12)
    tensors = factors() | plain(**{"q.base_layer.weight": stored})
    adapter = lt.from_state_dict(tensors, config())
    assert adapter["q.weight"].kind == "rebased"
    a, b = factors().values()
    assert np.abs(adapter["q.weight"].apply(None) - (stored + 2 * b @ a)).max() <= 64 * np.finfo(np.float32).eps * 16
    back, said = reread(adapter, tmp_path)
    assert said == config()
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[k], t) for k, t in tensors.items())


# biases and saved modules


@pytest.mark.parametrize("key", ["q.bias", "q.base_layer.bias"])
def test_lora_only_explains_the_biases_of_adapted_modules(key: str, tmp_path: Path) -> None:
    tensors = factors() | plain(**{key: random(10)})
    adapter = lt.from_state_dict(tensors, config(bias="lora_only"))
    assert adapter["q.bias"].kind == "replace"
    assert reread(adapter, tmp_path)[0].keys() == tensors.keys()
    with pytest.raises(FormatError, match="does not explain"):
        lt.from_state_dict(factors() | plain(**{"other.bias": random(10)}), config(bias="lora_only"))
    with pytest.raises(FormatError, match="does not explain"):
        lt.from_state_dict(tensors, config())


def named(name: str) -> Arrays:
    return {
        k.replace("lora_A.", f"lora_A.{name}.").replace("lora_B.", f"lora_B.{name}."): t for k, t in factors().items()
    }


SCORE = random(3, 12)
ORIGINAL = {"score.original_module.weight": np.zeros((3, 12), np.float32)}
SPELLINGS: dict[str, tuple[Arrays, dict[str, Any], str | None]] = {  # factors, saved tensors, remark
    "plain": (factors(), {"score.weight": SCORE}, None),
    "no name": (factors(), {"score.modules_to_save.weight": SCORE}, None),
    "default": (factors(), {"score.modules_to_save.default.weight": SCORE}, "the adapter name 'default'"),
    "named as in the factors": (named("mine"), {"score.modules_to_save.mine.weight": SCORE}, "the adapter name 'mine'"),
    "beside the original": (
        factors(),
        {"score.modules_to_save.mine.weight": SCORE} | ORIGINAL,
        "the adapter name 'mine'",
    ),
    "named alone": (factors(), {"score.modules_to_save.mine.weight": SCORE}, "'mine' is read as the adapter's name"),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_saved_modules_in_every_spelling(case: str, tmp_path: Path) -> None:
    lora, saved, remark = SPELLINGS[case]
    adapter = lt.from_state_dict(lora | plain(**saved), config(modules_to_save=["score"]))
    assert list(adapter) == ["q.weight", "score.weight"]
    assert np.array_equal(to_numpy(adapter["score.weight"].value), SCORE)  # type: ignore[attr-defined]
    assert told(adapter, remark) if remark else not adapter.meta.remarks
    assert told(adapter, "is read as") == (case == "named alone")
    tensors, _ = reread(adapter, tmp_path)
    assert np.array_equal(tensors[f"{PREFIX}score.weight"], SCORE)
    assert tensors.keys() == factors().keys() | plain(**{k: v for k, v in saved.items() if "original" in k}).keys() | {
        f"{PREFIX}score.weight"
    }


@pytest.mark.parametrize(
    ("saved", "names"),
    [
        (["h.modules_to_save.dense.weight", "h.modules_to_save.out.weight"], ["h.dense.weight", "h.out.weight"]),
        (["h.modules_to_save.me.dense.weight", "s.modules_to_save.me.weight"], ["h.dense.weight", "s.weight"]),
        (["h.modules_to_save.dense.weight", "h.original_module.dense.weight"], ["h.dense.weight"]),
    ],
)
def test_submodules_of_saved_modules_are_told_from_adapter_names(saved: list[str], names: list[str]) -> None:
    adapter = lt.from_state_dict(factors() | plain(**dict.fromkeys(saved, SCORE)), config(modules_to_save=["h", "s"]))
    assert list(adapter) == ["q.weight", *names]
    assert not told(adapter, "is read as")


def test_a_submodule_beside_factors_of_a_named_adapter() -> None:
    saved = plain(**{"h.modules_to_save.dense.weight": SCORE})
    adapter = lt.from_state_dict(named("mine") | saved, config(modules_to_save=["h"]))
    assert list(adapter) == ["q.weight", "h.dense.weight"]


# orientation


def test_the_bases_shapes_tell_the_orientation() -> None:
    a, b = factors(out=10, width=12).values()
    for shape, expected in (((10, 12), 2 * b @ a), ((12, 10), (2 * b @ a).T)):
        adapter = lt.from_state_dict(factors(), config(), base={"q.weight": np.zeros(shape, np.float32)})
        assert adapter["q.weight"].shape == shape
        assert np.abs(to_numpy(adapter["q.weight"].dense()) - expected).max() <= 1e-5  # type: ignore[attr-defined]
    with pytest.raises(MismatchError, match="does not fit the base"):
        lt.from_state_dict(factors(), config(), base={"q.weight": np.zeros((10, 13), np.float32)})


def test_square_weights_follow_their_siblings() -> None:
    """h.1.c is square; h.0.c, of the same name, is stored (in, out)."""
    tensors = factors("h.0.c", 10, 12) | factors("h.1.c", 12, 12)
    base = {"h.0.c.weight": np.zeros((12, 10), np.float32), "h.1.c.weight": np.zeros((12, 12), np.float32)}
    adapter = lt.from_state_dict(tensors, config(), base=base)
    a, b = factors("h.1.c", 12, 12).values()
    assert np.abs(to_numpy(adapter["h.1.c.weight"].dense()) - (2 * b @ a).T).max() <= 1e-5  # type: ignore[attr-defined]
    assert told(adapter, "fan_in_fan_out is false, but the base stores h.0.c as (in, out) (2 modules)")


def test_siblings_in_two_orientations_are_refused() -> None:
    tensors = factors("h.0.c", 10, 12) | factors("h.1.c", 10, 12)
    base = {"h.0.c.weight": np.zeros((12, 10), np.float32), "h.1.c.weight": np.zeros((10, 12), np.float32)}
    with pytest.raises(MismatchError, match="two orientations"):
        lt.from_state_dict(tensors, config(), base=base)


def test_fan_in_fan_out_against_the_base_is_told() -> None:
    base = {"q.weight": np.zeros((10, 12), np.float32)}
    adapter = lt.from_state_dict(factors(), config(fan_in_fan_out=True), base=base)
    assert adapter["q.weight"].shape == (10, 12)
    assert told(adapter, "fan_in_fan_out is true, but the base stores q as (out, in)")
    assert not lt.from_state_dict(factors(), config(), base=base).meta.remarks
    turned = {"q.weight": np.zeros((12, 10), np.float32)}
    assert not lt.from_state_dict(factors(), config(fan_in_fan_out=True), base=turned).meta.remarks
    assert not lt.from_state_dict(factors(), config(fan_in_fan_out=True)).meta.remarks  # nothing to compare with


def test_conv1d_is_read_from_the_base_alone(make: Callable[..., Any]) -> None:
    made = make("gpt2", r=4, lora_alpha=8, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    said = made.folder / "adapter_config.json"
    said.write_text(json.dumps(json.loads(said.read_text()) | {"fan_in_fan_out": False}))
    adapter = lt.load(made.folder, base=made.weights)
    for name, w in made.merged().items():
        if name in adapter:
            assert np.abs(adapter[name].apply(made.weights[name]) - w).max() <= 2e-6 * max(np.abs(w).max(), 1.0), name
