"""Slices against what each trainer computes at that rank: kohya, LyCORIS (itself), MatryoshkaLoRA; scales included.

The formulas of the trainers are written out here on their own: sd-scripts networks/dylora.py and
extract_lora_from_dylora.py, LyCORIS modules/dylora.py, MatryoshkaLoRA adapters/lora.py and adapters/matryoshka.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loratools as lt
from loratools.core.adapter import Adapter, Meta
from loratools.errors import MismatchError, MissingScaleError, UsageError
from loratools.kinds.dense import Dense
from loratools.kinds.dora import Dora
from loratools.kinds.lowrank import LowRank
from loratools.kinds.stack import Stack
from loratools.linalg.namespace import to_numpy

M, N, R = 10, 14, 8
EPS = 1e-6  # fp32 sums of eight products
STEM = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def pair(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((M, R)).astype("f4"), rng.standard_normal((R, N)).astype("f4")


def dense(adapter: Adapter) -> np.ndarray:
    (update,) = adapter.values()
    return to_numpy(update.dense())  # type: ignore[attr-defined]


def kohya(folder: Path, alpha: float, module: str = "networks.dylora", **args: Any) -> Path:
    b, a = pair()
    tensors = {f"{STEM}.lora_up.weight": b, f"{STEM}.lora_down.weight": a, f"{STEM}.alpha": np.float32(alpha)}
    said = {"ss_network_module": module, "ss_network_args": json.dumps(args), "ss_network_dim": str(R)}
    save_file({k: np.asarray(v) for k, v in tensors.items()}, folder / "dylora.safetensors", metadata=said)
    return folder / "dylora.safetensors"


def close(got: np.ndarray, want: np.ndarray) -> bool:
    return bool(np.abs(got - want).max() <= EPS * np.abs(want).max())


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("alpha", [8.0, 1.0, 3.0])
def test_kohya_splits_with_alpha_untouched(rank: int, alpha: float, tmp_path: Path) -> None:
    b, a = pair()
    done = lt.slice(lt.load(kohya(tmp_path, alpha)), rank=rank, scale_rule="alpha-over-r")
    assert close(dense(done), alpha / rank * b[:, :rank] @ a[:rank])  # its loader: alpha / rows of lora_down
    written = load_file(lt.save(done, tmp_path / "out.safetensors"))
    assert float(written[f"{STEM}.alpha"]) == pytest.approx(alpha, rel=1e-12)  # as its splitter leaves it
    assert np.array_equal(written[f"{STEM}.lora_up.weight"], b[:, :rank])
    assert np.array_equal(written[f"{STEM}.lora_down.weight"], a[:rank])


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_kohya_trains_with_the_root(rank: int, tmp_path: Path) -> None:
    """forward: x A^T B^T (alpha / R) sqrt(R / (trainable_rank + unit)), with the rows beyond it still untrained (0)."""
    b, a = pair()
    x = np.random.default_rng(1).standard_normal((5, N)).astype("f4")
    untrained = np.where(np.arange(R) < rank, b, 0)
    want = (x @ a.T) @ untrained.T * (4.0 / R) * np.sqrt(R / rank)
    done = lt.slice(lt.load(kohya(tmp_path, 4.0)), rank=rank, scale_rule="sqrt")
    assert close(x @ dense(done).T, want)


@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("alpha", [1.0, 6.0])
def test_lycoris_divides_alpha_by_blocks(blocks: int, alpha: float, tmp_path: Path) -> None:
    """LyCORIS' own module as the witness: get_diff_weight at a rank, and the factors of its own state dict."""
    torch = pytest.importorskip("torch")
    dylora = pytest.importorskip("lycoris.modules.dylora")
    layer = torch.nn.Linear(N, M, bias=False)
    module = dylora.DyLoraModule("x", layer, 1.0, R, alpha, block_size=2)
    generator = torch.Generator().manual_seed(0)
    for p in (*module.up_list, *module.down_list):
        torch.nn.init.normal_(p, generator=generator)
    want = (
        module.get_diff_weight(rank=2 * (blocks - 1))[0].detach().numpy()
    )  # it adds one block to what it is asked for
    state = {f"{STEM}.{k}": v.detach().numpy() for k, v in module.custom_state_dict().items()}
    said = {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps({"algo": "dylora", "block_size": "2"})}
    save_file({k: np.asarray(v, np.float32) for k, v in state.items()}, tmp_path / "l.safetensors", metadata=said)
    adapter = lt.load(tmp_path / "l.safetensors")
    assert close(dense(lt.slice(adapter, rank=2 * blocks, scale_rule="alpha-over-r", block_size=2)), want)
    with pytest.raises(UsageError, match="number of its blocks") as caught:
        lt.slice(adapter, rank=2, scale_rule="alpha-over-r")
    assert "--block-size 2" in str(caught.value)
    loaded = dense(lt.slice(adapter, rank=R, scale_rule="alpha-over-r", block_size=1))
    assert close(loaded, dense(adapter))  # what loaders apply at full rank


@pytest.mark.parametrize(("scaling", "rule"), [("none", "keep"), ("rank", "alpha-over-r"), ("sqrt", "sqrt")])
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_matryoshka_infers_at_s_of_r(scaling: str, rule: str, rank: int, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    b, a = pair()
    lora_a, lora_b = torch.from_numpy(a.T.copy()), torch.from_numpy(b.T.copy())
    torch.save({"model.layers.0.mlp.up_proj.lora_A": lora_a, "model.layers.0.mlp.up_proj.lora_B": lora_b},
               tmp_path / "lora_adapters_step=00200.pt")  # fmt: skip
    s = {"none": 1.0, "rank": 1 / rank, "sqrt": rank**-0.5}[scaling]
    x = np.random.default_rng(1).standard_normal((5, N)).astype("f4")
    want = s * ((x @ lora_a[:, :rank].numpy()) @ lora_b[:rank, :].numpy())
    adapter = lt.load(tmp_path / "lora_adapters_step=00200.pt")
    assert adapter.meta.format == "matryoshka"
    done = lt.slice(adapter, rank=rank, scale_rule=rule)
    assert close(x @ dense(done).T, want)
    again = lt.load(lt.save(done, tmp_path / "peft", format="peft"))
    assert close(x @ dense(again).T, want)


def test_a_whole_slice_is_the_adapter() -> None:
    b, a = pair()
    adapter = Adapter({"q.weight": LowRank(b, a, 0.7)})
    for rule in ("keep", "alpha-over-r", "sqrt"):
        done = lt.slice(adapter, rank=R, scale_rule=rule)
        update = done["q.weight"]
        assert isinstance(update, LowRank)
        assert update.scale == 0.7
        assert np.array_equal(to_numpy(update.b), b)
        assert done.report is not None
        assert done.report.total["relative_error"] == 0.0
        assert done.report.total["prefix_error"] <= 1e-7


@pytest.mark.parametrize("rule", ["keep", "alpha-over-r", "sqrt"])
def test_errors_are_those_of_dense_matrices(rule: str) -> None:
    b, a = pair()
    report = lt.slice(Adapter({"q.weight": LowRank(b, a, 2.0)}), rank=3, scale_rule=rule).report
    assert report is not None
    (row,) = report.modules
    whole, part = 2.0 * b.astype(float) @ a, 2.0 * b[:, :3].astype(float) @ a[:3]
    growth = {"keep": 1.0, "alpha-over-r": R / 3, "sqrt": (R / 3) ** 0.5}[rule]
    size = np.linalg.norm(whole)
    assert row["scale_after"] == pytest.approx(2.0 * growth)
    assert row["relative_error"] == pytest.approx(np.linalg.norm(whole - growth * part) / size, rel=1e-6)
    assert row["prefix_error"] == pytest.approx(np.linalg.norm(whole - part) / size, rel=1e-6)
    s = np.linalg.svd(whole, compute_uv=False)
    assert row["optimal_error"] == pytest.approx(np.linalg.norm(s[3:]) / size, rel=1e-6)
    assert row["prefix_error"] >= row["optimal_error"]
    assert report.total["prefix_error"] == pytest.approx(row["prefix_error"])


def test_coats_stacks_and_the_rest() -> None:
    b, a = pair()
    stack = Stack(np.stack([b, 2 * b]), np.stack([a, a]))
    adapter = Adapter(
        {
            "q.weight": Dora(LowRank(b, a, 2.0), np.ones(M, np.float32)),
            "e.up": stack,
            "q.bias": Dense(np.ones(M, np.float32)),
        }
    )
    done = lt.slice(adapter, rank=2, scale_rule="keep")
    coat = done["q.weight"]
    assert isinstance(coat, Dora)
    assert isinstance(coat.direction, LowRank)
    assert coat.direction.rank == 2
    assert np.allclose(to_numpy(done["e.up"].dense())[1], 2 * b[:, :2] @ a[:2], atol=1e-4)  # type: ignore[attr-defined]
    assert done["q.bias"] is adapter["q.bias"]


def test_nested_squeezes_have_optimal_slices_at_the_kept_scale() -> None:
    rng = np.random.default_rng(2)
    small = rng.standard_normal((M, 5)).astype("f4"), rng.standard_normal((5, N)).astype("f4")
    adapter = Adapter({"q.weight": LowRank(*pair(3), 2.0), "k.weight": LowRank(*small)})
    nested = lt.squeeze(adapter, nested=True)
    assert nested.meta.history == ("squeeze nested",)
    before = 0.0
    for rank in range(5, 0, -1):
        report = lt.slice(nested, rank=rank, scale_rule="keep").report
        assert report is not None
        assert report.warnings == ()
        for row in report.modules:
            assert row["prefix_error"] <= row["optimal_error"] + 2e-6  # rounding of fp32 factors
        assert report.total["prefix_error"] >= before - 1e-9  # fewer channels never serve better
        before = report.total["prefix_error"]
    warned = lt.slice(nested, rank=2, scale_rule="alpha-over-r").report
    assert warned is not None
    assert any("keep" in w for w in warned.warnings)


def test_nested_orders_a_trained_adapter_whose_slices_are_poor(digits: Path) -> None:
    adapter = lt.load(digits / "r32")
    raw, nested = (
        lt.slice(adapter, rank=4, scale_rule="keep"),
        lt.slice(lt.squeeze(adapter, nested=True), rank=4, scale_rule="keep"),
    )
    assert raw.report is not None
    assert nested.report is not None
    assert nested.report.total["prefix_error"] == pytest.approx(nested.report.total["optimal_error"], rel=1e-5)
    assert raw.report.total["prefix_error"] > 2 * nested.report.total["prefix_error"]
    direct = lt.squeeze(adapter, rank=4)
    name = next(iter(direct))
    got, want = (x[name].dense() for x in (nested, direct))  # type: ignore[attr-defined]
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


def test_units_and_trainers_are_said(tmp_path: Path) -> None:
    adapter = lt.load(kohya(tmp_path, 4.0, unit="4"))
    report = lt.slice(adapter, rank=3, scale_rule="keep").report
    assert report is not None
    assert any("units of 4: rank 3 was never used alone" in w for w in report.warnings)
    assert any("do not keep the scale" in w for w in report.warnings)
    report = lt.slice(adapter, rank=4, scale_rule="alpha-over-r").report
    assert report is not None
    assert report.warnings == ()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"rank": 9, "scale_rule": "keep"}, MismatchError, "1 of 1 modules have fewer channels"),
        ({"rank": 0, "scale_rule": "keep"}, UsageError, "rank out of range"),
        ({"rank": 2, "scale_rule": "rslora"}, UsageError, "no such scale rule"),
        ({"rank": 3, "scale_rule": "keep", "block_size": 2}, UsageError, "whole number of blocks"),
        ({"rank": 3, "scale_rule": "keep", "block_size": 0}, UsageError, "whole number of blocks"),
    ],
)
def test_refusals(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        lt.slice(Adapter({"q.weight": LowRank(*pair())}), **options)


def test_what_has_no_channels_or_no_scale_is_refused() -> None:
    with pytest.raises(UsageError, match="no channels"):
        lt.slice(Adapter({"q.weight": Dense(np.ones((2, 2), np.float32))}), rank=1, scale_rule="keep")
    unscaled = Adapter({"q.weight": LowRank(*pair())}, Meta(format="loralib", scaled=False))
    with pytest.raises(MissingScaleError, match="loralib"):
        lt.slice(unscaled, rank=1, scale_rule="sqrt")
    assert not lt.slice(unscaled, rank=1, scale_rule="keep").meta.scaled  # it stays unknown
