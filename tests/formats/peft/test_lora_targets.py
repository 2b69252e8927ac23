"""A kept config is brought in line with the adapter: PEFT drops in silence what its config does not name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import loratools as lt
from loratools.core.adapter import Meta
from loratools.core.update import Update
from loratools.errors import ConversionError
from loratools.formats.base import FORMATS
from loratools.kinds.dora import Dora
from loratools.kinds.lowrank import LowRank
from loratools.kinds.replace import Replace
from loratools.kinds.stack import Stack

PREFIX = "base_model.model."


def random(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def pair(scale: float = 2.0) -> LowRank:
    return LowRank(random(10, 4), random(4, 12), scale)


def source(**said: Any) -> lt.Adapter:
    """An adapter of a PEFT file with factors of a.q alone."""
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"], **said}
    u = pair()
    return lt.from_state_dict({f"{PREFIX}a.q.lora_A.weight": u.a, f"{PREFIX}a.q.lora_B.weight": u.b}, config)


def with_more(adapter: lt.Adapter, **updates: Update) -> lt.Adapter:
    return replace(adapter, updates={**adapter.updates, **updates})


def encoded(adapter: lt.Adapter) -> tuple[dict[str, Any], set[str]]:
    """Return the config that changed against the source's, and the keys."""
    bundle = FORMATS["peft"].encode(adapter)
    assert bundle.config is not None
    said = {k: v for k, v in bundle.config.items() if adapter.meta.config.get(k) != v}
    return said, {key.removeprefix(PREFIX) for key in bundle.tensors}


def test_a_config_that_holds_is_kept() -> None:
    assert encoded(source())[0] == {}
    assert encoded(source(target_modules=".*q"))[0] == {}
    assert encoded(source(target_modules="all-linear"))[0] == {}
    assert encoded(source(target_modules=None))[0] == {}
    assert encoded(with_more(source(), **{"b.q.weight": pair()}))[0] == {}


@pytest.mark.parametrize(
    ("said", "changed"),
    [
        ({}, {"target_modules": ["q", "b.k"]}),
        ({"target_modules": ".*q"}, {"target_modules": ["a.q", "b.k"]}),
        ({"target_modules": None}, {"target_modules": ["a.q", "b.k"]}),
        (
            {"target_modules": ["q", "k"], "exclude_modules": ["b"]},
            {"target_modules": ["a.q", "b.k"], "exclude_modules": None},
        ),
        (
            {"target_modules": ["q", "k"], "layers_to_transform": [0], "layers_pattern": "a"},
            {"target_modules": ["a.q", "b.k"], "layers_to_transform": None, "layers_pattern": None},
        ),
    ],
)  # fmt: skip
def test_added_modules_are_targeted(said: dict[str, Any], changed: dict[str, Any]) -> None:
    assert encoded(with_more(source(**said), **{"b.k.weight": pair()}))[0] == changed


def test_renamed_modules_are_targeted() -> None:
    adapter = replace(source(), updates={"b.k.weight": pair()})
    said, keys = encoded(adapter)
    assert said == {"target_modules": ["q", "b.k"]}
    assert keys == {"b.k.lora_A.weight", "b.k.lora_B.weight"}


def test_added_experts_are_named_among_the_parameters() -> None:
    stack = Stack(random(3, 10, 4), random(3, 4, 12), 2.0)
    assert encoded(with_more(source(), **{"m.experts.down_proj": stack}))[0] == {
        "target_parameters": ["m.experts.down_proj"]
    }


def test_use_dora_follows_the_updates() -> None:
    coated = Dora(pair(), np.ones(10, np.float32))
    assert encoded(replace(source(), updates={"a.q.weight": coated}))[0] == {"use_dora": True}
    assert encoded(source(use_dora=True))[0] == {"use_dora": False}


def test_replaced_modules_are_saved() -> None:
    whole = {"b.norm.weight": Replace(random(5)), "b.norm.bias": Replace(random(5)), "c.weight": Replace(random(5))}
    said, keys = encoded(with_more(source(modules_to_save=["c"]), **whole))
    assert said == {"modules_to_save": ["c", "b.norm"]}
    assert keys >= {"b.norm.weight", "b.norm.bias", "c.weight"}
    assert encoded(with_more(source(), **{"lm_head.weight": Replace(random(5))}))[0] == {}  # PEFT's habit


def test_replaced_biases_of_adapted_modules_lie_in_their_base_layer() -> None:
    said, keys = encoded(with_more(source(), **{"a.q.bias": Replace(random(10))}))
    assert said == {"bias": "lora_only"}
    assert "a.q.base_layer.bias" in keys


@pytest.mark.parametrize("name", ["cls_token", "a.scale"])
def test_whole_parameters_that_no_saved_module_can_hold_are_refused(name: str) -> None:
    with pytest.raises(ConversionError, match="no saved module") as caught:
        encoded(with_more(source(), **{name: Replace(random(5))}))
    assert caught.value.parameter == name


@pytest.mark.parametrize("name", ["a.kernel", "weight", "a.q.bias", "table"])
@pytest.mark.parametrize("coated", [False, True])
def test_factors_of_what_is_no_weight_of_a_module_are_refused(name: str, coated: bool) -> None:
    u = Dora(pair(), np.ones(10, np.float32)) if coated else pair()
    for adapter in (with_more(source(), **{name: u}), lt.Adapter({name: u}, Meta())):
        with pytest.raises(ConversionError, match="weights of modules") as caught:
            FORMATS["peft"].encode(adapter)
        assert caught.value.parameter == name


def test_peft_loads_every_added_tensor(make: Callable[..., Any], reload: Callable[..., Any], tmp_path: Path) -> None:
    """Factors, a bias and a norm added to an adapter of q_proj in the first layer: PEFT applies them all."""
    made = make("bert", r=4, lora_alpha=8, target_modules=["query"], layers_to_transform=[0])
    adapter = lt.load(made.folder)
    layer = "bert.encoder.layer.1."
    key, norm = f"{layer}attention.self.key", f"{layer}output.LayerNorm"
    added = with_more(
        adapter,
        **{
            f"{key}.weight": LowRank(random(32, 2), random(2, 32), 0.5),
            f"{key}.bias": Replace(random(32)),
            f"{norm}.weight": Replace(random(32)),
            f"{norm}.bias": Replace(random(32)),
        },
    )
    out = lt.save(added, tmp_path / "out")
    expected = {n: added[n].apply(w) if n in added else w for n, w in made.weights.items()}
    merged = reload(made, out).merge_and_unload().state_dict()
    for name, w in expected.items():
        assert np.abs(merged[name].numpy() - w).max() <= 2e-6 * max(np.abs(w).max(), 1.0), name  # fp32 roundings
    assert set(lt.load(out)) == set(added)
    said = json.loads((out / "adapter_config.json").read_text())
    assert said["modules_to_save"] == [norm]
    assert f"{PREFIX}{key}.base_layer.bias" in load_file(out / "adapter_model.safetensors")
