"""Every form of module that PEFT saves under LORA: it means what PEFT says, comes back byte for byte, and squeezes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratools as lt
from loratools.io.base import Base

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CONVS = ["plane", "mix", "point", "line", "volume"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "conv": ("convnet", {"target_modules": CONVS, "rank_pattern": {"point": 2}}),
    "conv-rslora": ("convnet", {"target_modules": [*CONVS, "head"], "use_rslora": True}),
    "conv-bias": ("convnet", {"target_modules": CONVS, "lora_bias": True}),
    "conv-dora": ("convnet", {"target_modules": CONVS, "use_dora": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding-head": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "embedding-dora": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "embedding-gpt2": ("gpt2", {"target_modules": ["wte", "c_attn"], "fan_in_fan_out": True}),
    "embedding-tied": ("tied", {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}),
    "attention": ("attention", {"target_modules": ["mha"], "bias": "all"}),
    "attention-patterns": ("attention", {"target_modules": ["mha", "head"], "rank_pattern": {"mha": 2}}),
    "experts": ("mixtral", {"target_modules": [], "target_parameters": EXPERTS}),
    "experts-patterns": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS[::-1], "rank_pattern": {"experts.down_proj": 2},
         "alpha_pattern": {"gate_up_proj": 3}},
    ),
    "experts-one": ("mixtral", {"target_modules": [], "target_parameters": EXPERTS[1:]}),
    "experts-bare-name": ("mixtral", {"target_modules": ["v_proj"], "target_parameters": ["down_proj"]}),
    "experts-transposed": ("gpt_oss", {"target_modules": [], "target_parameters": EXPERTS}),
    "router": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3, 60]}),
    "tokens-two": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [9, 1], "lm_head": [0]}},
    ),
    "tokens-tied": ("tied", {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3]}),
    "bd-lora": (
        "llama",
        {"target_modules": ["q_proj", "o_proj", "v_proj"],
         "use_bdlora": {"target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 2,
                        "match_strict": False}},
    ),
    "monteclora": ("llama", {"target_modules": ["q_proj"], "monteclora_config": {}}),
    "velora": ("llama", {"target_modules": ["q_proj"], "velora_config": {"num_groups": 4}}),
    "mica": ("llama", {"target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": "mica"}),
    "qalora-plain": ("llama", {"target_modules": ["q_proj", "v_proj"], "use_qalora": True, "qalora_group_size": 8}),
}  # fmt: skip
TIED = {"tied": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}
SQUEEZABLE = [
    case for case in CASES if "dora" not in case and case not in ("tokens-tied", "embedding-tied", "embedding-gpt2")
]


def made_of(make: Callable[..., Any], case: str) -> Any:
    from peft.tuners.lora.config import BdLoraConfig, MontecloraConfig, VeloraConfig

    model, config = CASES[case]
    builders = {"use_bdlora": BdLoraConfig, "monteclora_config": MontecloraConfig, "velora_config": VeloraConfig}
    said = {key: builders[key](**value) if key in builders else value for key, value in config.items()}
    return make(model, **{"r": 4, "lora_alpha": 8, **said})


def base_of(made: Any) -> Base:
    """Return the base in memory, with the config that tells model types."""
    opened = Base.open(made.weights)
    opened.config = made.base.config.to_dict() if hasattr(made.base, "config") else {}
    return opened


def folded(adapter: lt.Adapter, weights: dict[str, Any]) -> dict[str, Any]:
    out = {name: adapter[name].apply(w) if name in adapter else w for name, w in weights.items()}
    return out | {name: u.apply(None) for name, u in adapter.items() if name not in weights}


@pytest.mark.parametrize("case", [case for case in CASES if case != "embedding-tied"])
def test_means_what_peft_says(make: Callable[..., Any], case: str) -> None:
    made = made_of(make, case)
    adapter = lt.load(made.folder, base=base_of(made))
    ours, theirs = folded(adapter, made.weights), made.merged()
    if made.name in TIED:
        ours["lm_head.weight"] = ours[TIED[made.name]]  # one tensor under two names
    for name, w in theirs.items():
        assert np.abs(ours[name] - w).max() <= 2e-6 * max(np.abs(w).max(), 1.0), name  # a few fp32 roundings
    changed = {name for name, w in theirs.items() if not np.array_equal(w, made.weights.get(name))}
    assert changed <= {*adapter, "lm_head.weight"}
    assert not adapter.meta.unmergeable


def test_both_sides_of_a_tie_get_the_same_change(make: Callable[..., Any]) -> None:
    """PEFT's own merge adds the two adapters of a tied weight to the one tensor; its forward pass is the oracle."""
    import torch

    made = made_of(make, "embedding-tied")
    expected = made.logits(made.model)
    ours = folded(lt.load(made.folder), made.weights)
    assert np.abs(ours["lm_head.weight"] - ours["model.embed_tokens.weight"]).max() <= 1e-6
    fresh = type(made.base)(made.base.config).eval()
    fresh.load_state_dict({name: torch.from_numpy(np.array(w)) for name, w in ours.items()})
    assert (made.logits(fresh) - expected).abs().max() <= 1e-5 * max(expected.abs().max(), 1)


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_comes_back_as_peft_wrote_it(make: Callable[..., Any], tmp_path: Path, case: str, with_base: bool) -> None:
    made = made_of(make, case)
    adapter = lt.load(made.folder, base=base_of(made) if with_base else None)
    native = lt.load(lt.save(adapter, tmp_path / "native.safetensors", format="native"))
    theirs = (made.folder / "adapter_model.safetensors").read_bytes()
    config = json.loads((made.folder / "adapter_config.json").read_text())
    for i, source in enumerate((adapter, native)):
        out = lt.save(source, tmp_path / f"out{i}", format="peft")
        assert (out / "adapter_model.safetensors").read_bytes() == theirs
        assert json.loads((out / "adapter_config.json").read_text()) == config


@pytest.mark.parametrize("keep_alpha", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_full_rank_squeeze_keeps_the_logits(
    make: Callable[..., Any], reload: Callable[..., Any], tmp_path: Path, case: str, keep_alpha: bool
) -> None:
    made = made_of(make, case)
    expected = made.logits(made.model)
    out = lt.save(lt.squeeze(lt.load(made.folder), rank=64, keep_alpha=keep_alpha), tmp_path / "out")
    got = made.logits(reload(made, out))
    assert (got - expected).abs().max() <= 1e-5 * max(expected.abs().max(), 1)


def optimum(base: Any, merged: Any, rank: int, *, stacked: bool) -> Any:
    """Return base + the best change of the given rank, expert by expert for a stack."""
    delta = merged.astype(np.float64) - base
    parts = delta if stacked else delta.reshape(1, delta.shape[0], -1)
    u, s, vh = np.linalg.svd(parts, full_matrices=False)
    best = (u[..., :rank] * s[:, None, :rank]) @ vh[:, :rank, :]
    return (base + best.reshape(delta.shape)).astype(np.float32)


@pytest.mark.parametrize("case", SQUEEZABLE)
def test_squeezed_logits_are_those_of_the_dense_optimum(
    make: Callable[..., Any], reload: Callable[..., Any], tmp_path: Path, case: str
) -> None:
    import torch

    made = made_of(make, case)
    adapter = lt.load(made.folder, base=base_of(made))
    out = lt.save(lt.squeeze(adapter, rank=1), tmp_path / "out")
    got = made.logits(reload(made, out))
    states = {}
    for name, w in made.merged().items():
        factored = name in adapter and adapter[name].kind in ("lowrank", "stack", "rebased")
        states[name] = torch.from_numpy(
            optimum(made.weights[name], w, 1, stacked=adapter[name].kind == "stack") if factored else np.array(w)
        )
    if made.name in TIED:
        states["lm_head.weight"] = states[TIED[made.name]]
    made.base.load_state_dict(states)
    expected = made.logits(made.base)
    assert (got - expected).abs().max() <= 2e-5 * max(expected.abs().max(), 1)


def test_projections_of_one_attention_share_a_line_of_the_config(
    make: Callable[..., Any], reload: Callable[..., Any], tmp_path: Path
) -> None:
    """Ranks and scales that a squeeze left unequal are written as one rank and one scale."""
    made = make("attention", r=4, lora_alpha=8, target_modules=["mha"])
    adapter = lt.load(made.folder)
    assert sum("twice" in remark for remark in adapter.meta.remarks) == 1
    squeezed = lt.squeeze(adapter, error=0.4)
    ranks = {name: u.rank for name, u in squeezed.items()}  # type: ignore[attr-defined]
    cut = lt.squeeze(adapter, rank=1)
    mixed = lt.Adapter(
        {"mha.in_proj_weight": adapter["mha.in_proj_weight"], "mha.out_proj.weight": cut["mha.out_proj.weight"]},
        adapter.meta,
    )
    for one in (squeezed, mixed):
        again = lt.load(lt.save(one, tmp_path / "out", overwrite=True))
        for name in one:
            ours, theirs = one[name].dense(), again[name].dense()  # type: ignore[attr-defined]
            assert np.abs(ours - theirs).max() <= 1e-6 * np.abs(ours).max(), (name, ranks)
        reload(made, tmp_path / "out")


def test_a_bias_of_in_proj_has_no_effect_and_is_carried(make: Callable[..., Any], tmp_path: Path) -> None:
    made = make("attention", r=4, lora_alpha=8, target_modules=["mha"], lora_bias=True)
    adapter = lt.load(made.folder)
    merged = made.merged()
    for name, w in folded(adapter, made.weights).items():
        assert np.abs(w - merged[name]).max() <= 2e-6, name  # a few fp32 roundings
    out = lt.save(adapter, tmp_path / "out")
    assert (out / "adapter_model.safetensors").read_bytes() == (made.folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("case", ["attention", "conv", "experts", "embedding", "bd-lora", "conv-bias"])
def test_a_budget_is_kept_whatever_the_form(make: Callable[..., Any], tmp_path: Path, case: str) -> None:
    made = made_of(make, case)
    adapter = lt.load(made.folder)
    whole = (made.folder / "adapter_model.safetensors").stat().st_size
    smallest = (lt.save(lt.squeeze(adapter, rank=1), tmp_path / "one") / "adapter_model.safetensors").stat().st_size
    size = (whole + 3 * smallest) // 4
    out = lt.save(lt.squeeze(adapter, size=size), tmp_path / "out")
    assert (out / "adapter_model.safetensors").stat().st_size <= size
