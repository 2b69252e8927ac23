"""Collapsing mixtures: exact for the routing asked for, whatever the layout; the spread is that of brute force."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import loratools as lt
from loratools.cli.main import _code
from loratools.core.adapter import Adapter
from loratools.errors import FormatError, LoratoolsError, MissingScaleError, UnsupportedError, UsageError
from loratools.linalg.namespace import to_numpy
from loratools.ops import routing as routes

Array = np.ndarray[Any, Any]
EPS = float(np.finfo(np.float32).eps)
E = 4
UP, DOWN, QUERY = (f"model.layers.0.{p}.weight" for p in ("mlp.up_proj", "mlp.down_proj", "self_attn.q_proj"))


def dice(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def mixlora() -> dict[str, Array]:
    """As MixLoRA saves it: experts of the MLP, plain LoRA on attention, a gate per layer."""
    tensors: dict[str, Array] = {"mixlora.layers.0.gate.weight": dice(0, E, 8)}
    for e in range(E):
        for i, (p, out, width) in enumerate((("up_proj", 12, 8), ("down_proj", 8, 12))):
            stem = f"mixlora.layers.0.experts.{e}.{p}"
            tensors |= {
                f"{stem}.lora_A.weight": dice(10 * e + i + 1, 2, width),
                f"{stem}.lora_B.weight": dice(10 * e + i + 5, out, 2),
            }
    q = "mixlora.layers.0.self_attn.q_proj"
    return tensors | {f"{q}.lora_A.weight": dice(91, 2, 8), f"{q}.lora_B.weight": dice(92, 8, 2)}


def written(folder: Path, tensors: dict[str, Array], config: dict[str, Any] | None = None, toml: str = "") -> Path:
    save_file(tensors, folder / "adapter_model.safetensors")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    if toml:
        (folder / "m.toml").write_text(f'manifest = 1\nweights = "adapter_model.safetensors"\n{toml}')
        return folder / "m.toml"
    return folder


def expert(tensors: dict[str, Array], e: int, p: str, scale: float = 2.0) -> Array:
    stem = f"mixlora.layers.0.experts.{e}.{p}"
    return (
        scale
        * tensors[f"{stem}.lora_B.weight"].astype(np.float64)
        @ tensors[f"{stem}.lora_A.weight"].astype(np.float64)
    )


def dense(adapter: Adapter, name: str) -> Array:
    return to_numpy(adapter[name].dense()).astype(np.float64)  # type: ignore[attr-defined]


def near(got: Array, want: Array) -> None:
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= 64 * EPS * np.abs(want).max()


CONFIG = {"peft_type": "MIXLORA", "r": 2, "lora_alpha": 4, "num_experts": E, "base_model_name_or_path": "some/llama"}


def test_a_subset_is_the_weighted_sum_of_its_experts(tmp_path: Path) -> None:
    tensors = mixlora()
    done = lt.collapse(written(tmp_path, tensors, CONFIG), experts=[1, 3])
    for p, name in (("up_proj", UP), ("down_proj", DOWN)):
        near(dense(done, name), (expert(tensors, 1, p) + expert(tensors, 3, p)) / 2)
        assert done[name].rank == 4  # type: ignore[attr-defined]
    q = "mixlora.layers.0.self_attn.q_proj"
    near(dense(done, QUERY), 2.0 * tensors[f"{q}.lora_B.weight"].astype(np.float64) @ tensors[f"{q}.lora_A.weight"])
    assert done.meta.base_id == "some/llama"
    half = lt.collapse(tmp_path, experts=[1, 3], omega=0.25)
    near(dense(half, UP), dense(done, UP) / 2)


def test_one_expert_is_exact_and_several_of_a_network_are_said_not_to_be(tmp_path: Path) -> None:
    folder = written(tmp_path, mixlora(), CONFIG)
    one, two = (lt.collapse(folder, experts=e).report for e in ([2], [1, 2]))
    assert one is not None and two is not None
    assert (one.total["exact"], two.total["exact"]) == (True, False)
    assert not any("not" in w and "exact" in w for w in one.warnings)
    assert any("several are not" in w for w in two.warnings)
    assert any("routers are left behind" in w for w in one.warnings)


def test_the_spread_is_that_of_every_subset(tmp_path: Path) -> None:
    tensors = mixlora()
    done = lt.collapse(written(tmp_path, tensors, CONFIG), experts=[0, 2])
    assert done.report is not None
    row = next(r for r in done.report.modules if r["name"] == UP)
    every = [expert(tensors, e, "up_proj") for e in range(E)]
    chosen = (every[0] + every[2]) / 2
    gaps = [np.linalg.norm((every[i] + every[j]) / 2 - chosen) for i, j in combinations(range(E), 2)]
    norm = np.linalg.norm(chosen)
    assert row["spread_max"] == pytest.approx(max(gaps) / norm, rel=1e-5)
    assert row["spread_rms"] == pytest.approx(np.sqrt(np.mean(np.square(gaps))) / norm, rel=1e-5)
    unit = np.array([d.ravel() / np.linalg.norm(d) for d in every])
    values = np.linalg.eigvalsh(unit @ unit.T)
    assert row["effective_experts"] == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-5)


def test_the_mean_and_a_routing_file(tmp_path: Path) -> None:
    tensors = mixlora()
    folder = written(tmp_path, tensors, CONFIG)
    every = [expert(tensors, e, "up_proj") for e in range(E)]
    done = lt.collapse(folder, mean=True)
    near(dense(done, UP), sum(every) / E)
    assert done.report is not None
    row = next(r for r in done.report.modules if r["name"] == UP)
    gaps = [np.linalg.norm(d - sum(every) / E) for d in every]  # mixtures of experts are in the hull of single ones
    assert row["spread_max"] == pytest.approx(max(gaps) / np.linalg.norm(sum(every) / E), rel=1e-5)
    w = np.abs(dice(7, 50, E)).astype(np.float64)
    np.savez(tmp_path / "routes.npz", **{"model.layers.0": w / w.sum(1, keepdims=True), "model.layers.1": w})
    mean = (w / w.sum(1, keepdims=True)).mean(0)
    near(
        dense(lt.collapse(folder, routing=tmp_path / "routes.npz"), UP),
        sum(m * d for m, d in zip(mean, every, strict=True)),
    )
    logits = {"model.layers.0.mlp.gate.weight": dice(8, 30, E)}
    top = np.sort(logits["model.layers.0.mlp.gate.weight"].astype(np.float64), axis=1)[:, -2:-1]
    x = logits["model.layers.0.mlp.gate.weight"].astype(np.float64)
    kept = np.where(x >= top, np.exp(x), 0.0)
    mean = (kept / kept.sum(1, keepdims=True)).mean(0)
    got = lt.collapse(folder, routing=logits, logits=True, top_k=2)
    near(dense(got, UP), sum(m * d for m, d in zip(mean, every, strict=True)))


@pytest.mark.parametrize("shared", ["", "A", "B"])
def test_numbered_factors_of_one_layer_and_shared_ones(shared: str, tmp_path: Path) -> None:
    """HydraLoRA's kind: one A, many B; the collapsed adapter keeps its rank, and several experts are exact."""
    tensors: dict[str, Array] = {}
    for side, shape in (("A", (2, 9)), ("B", (6, 2))):
        for e in range(E):
            key = f"base_model.model.l.0.q.lora_{side}.{e}.weight"
            if side == shared:
                tensors[f"base_model.model.l.0.q.lora_{side}.weight"] = dice(99, *shape)
            else:
                tensors[key] = dice(e + (20 if side == "B" else 0), *shape)

    def factor(side: str, e: int) -> Array:
        key = f"base_model.model.l.0.q.lora_{side}.{e}.weight"
        return tensors.get(key, tensors.get(f"base_model.model.l.0.q.lora_{side}.weight", np.zeros(0))).astype(
            np.float64
        )

    done = lt.collapse(written(tmp_path, tensors), experts=[0, 1, 3], omega=0.5, scale=3.0)
    near(dense(done, "l.0.q.weight"), 1.5 * sum((factor("B", e) @ factor("A", e) for e in (0, 1, 3)), np.zeros((6, 9))))
    assert done["l.0.q.weight"].rank == (2 if shared else 6)  # type: ignore[attr-defined]
    assert done.report is not None
    assert done.report.total["exact"]
    with pytest.raises(MissingScaleError, match="scale"):
        lt.collapse(tmp_path, mean=True)


def test_queryable_lora_by_a_manifest(tmp_path: Path) -> None:
    """y = W x + s B C(x) A x with C(x) a convex mix of shared atoms: the mean core, of unchanged rank."""
    tensors = {f"atoms.{m}": dice(m, 3, 3) for m in range(5)}
    for i in range(2):
        tensors |= {f"layers.{i}.A": dice(10 + i, 3, 9), f"layers.{i}.B": dice(20 + i, 7, 3)}
    toml = ('[[update]]\nname = "model.{i}.w"\nexperts = "m"\nscale = 0.5\n'
            'delta = {product = ["layers.{i}.B", "atoms.{m}", "layers.{i}.A"]}')  # fmt: skip
    path = written(tmp_path, tensors, toml=toml)
    with pytest.raises(UnsupportedError, match="collapse"):
        lt.load(path)
    alpha = np.array([[0.5, 0.5, 0, 0, 0], [0, 0.2, 0.3, 0.5, 0]])
    for done, weights in (
        (lt.collapse(path, mean=True), np.full(5, 0.2)),
        (lt.collapse(path, routing={"router": alpha}), alpha.mean(0)),
        (lt.collapse(path, experts=[4]), np.eye(5)[4]),
    ):
        core = sum(w * tensors[f"atoms.{m}"].astype(np.float64) for m, w in enumerate(weights))
        for i in range(2):
            near(dense(done, f"model.{i}.w"), 0.5 * tensors[f"layers.{i}.B"] @ core @ tensors[f"layers.{i}.A"])
            assert done[f"model.{i}.w"].rank == 3  # type: ignore[attr-defined]


def test_remix_by_a_manifest_and_a_constant_weight(tmp_path: Path) -> None:
    """y = W x + omega sum over the chosen of B_i A_i x."""
    tensors = {
        f"e.{i}.{f}": dice(i + (9 if f == "B" else 0), *s) for i in range(3) for f, s in (("A", (2, 9)), ("B", (7, 2)))
    }
    path = written(
        tmp_path, tensors, toml='[[update]]\nname = "w"\nexperts = "i"\ndelta = {product = ["e.{i}.B", "e.{i}.A"]}'
    )
    got = dense(lt.collapse(path, experts=[0, 2], omega=1.5), "w")
    near(
        got, 1.5 * sum((tensors[f"e.{i}.B"].astype(np.float64) @ tensors[f"e.{i}.A"] for i in (0, 2)), np.zeros((7, 9)))
    )


def test_what_is_no_mixture_or_no_choice_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path, mixlora(), CONFIG)
    for choice in ({}, {"mean": True, "experts": [0]}, {"experts": [0, 0]}, {"experts": [9]}, {"experts": []},
                   {"mean": True, "omega": 0.0}):  # fmt: skip
        with pytest.raises(UsageError):
            lt.collapse(folder, **choice)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="another number of experts"):
        lt.collapse(folder, routing={"r": np.ones((2, 3))})
    with pytest.raises(FormatError, match="no router"):
        lt.collapse(folder, routing={"x.1": np.ones((2, E)), "x.2": np.ones((2, E))})
    with pytest.raises(FormatError, match="no routed mixture"):
        lt.collapse(Path(__file__).parents[2] / "fixtures" / "digits" / "r4", mean=True)
    lost = {k: v for k, v in mixlora().items() if "experts.2.up_proj" not in k}
    (tmp_path / "lost").mkdir()
    with pytest.raises(FormatError, match="experts are missing"):
        lt.collapse(written(tmp_path / "lost", lost, CONFIG), mean=True)
    (tmp_path / "odd").mkdir()
    with pytest.raises(FormatError, match="no rule of mixtures"):
        lt.collapse(written(tmp_path / "odd", {**mixlora(), "else": dice(1, 2)}, CONFIG), mean=True)
    with pytest.raises(LoratoolsError, match="collapse"):
        lt.load(folder)


def test_the_command_writes_a_peft_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    folder = written(tmp_path / "in", mixlora(), CONFIG)
    assert _code(["collapse", str(folder), "--experts", "0,2", "-o", str(tmp_path / "out"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["schema"] == "loratools.collapse/1"
    assert said["total"]["experts"] == E
    again = lt.load(tmp_path / "out")
    assert again.meta.format == "peft"
    near(dense(again, UP), dense(lt.collapse(folder, experts=[0, 2]), UP))
    assert _code(["collapse", str(folder), "--experts", "0,x"]) == 2


# routing


def test_effective_number_of_experts() -> None:
    assert float(routes.effective(np.array([0.97, 0.01, 0.01, 0.01]))) == pytest.approx(1.0625, abs=1e-4)
    for k in (1, 3, 8):
        assert float(routes.effective(np.ones(k))) == pytest.approx(k)
    report = lt.routing({"a": np.array([[1.0, 0, 0, 0], [0.25] * 4]), "b": np.ones((2, 2, 4))})
    a, b = report.to_rows()
    assert (a["effective_experts"], a["at_most_two"], a["tokens"]) == (2.5, 0.5, 2)
    assert a["entropy"] == pytest.approx(np.log(4) / 2)
    assert a["dominant"] == pytest.approx(0.625)
    assert a["load_effective"] == pytest.approx(1 / (0.625**2 + 3 * 0.125**2))
    assert (b["tokens"], b["effective_experts"]) == (4, pytest.approx(4))
    assert report.total["effective_experts"] == pytest.approx((2.5 * 2 + 4 * 4) / 6)


@pytest.mark.parametrize(("sigma", "share"), [(1.0, 0.016), (2.0, 0.30), (4.0, 0.69)])
def test_collapse_of_routing_weights_depends_on_the_scale_of_the_logits(sigma: float, share: float) -> None:
    """Softmax of normal logits over 8 experts: how often at most two are effective."""
    x = np.random.default_rng(0).standard_normal((20000, 8)) * sigma
    assert lt.routing({"r": x}, logits=True).total["at_most_two"] == pytest.approx(share, abs=0.015)


def test_top_k_and_what_is_no_weight() -> None:
    x = np.array([[3.0, 1.0, 2.0, 0.0]])
    assert lt.routing({"r": x}, logits=True, top_k=1).total["effective_experts"] == pytest.approx(1)
    p = np.exp([3.0, 2.0]) / np.exp([3.0, 2.0]).sum()
    assert lt.routing({"r": x}, logits=True, top_k=2).total["effective_experts"] == pytest.approx(1 / (p**2).sum())
    with pytest.raises(UsageError):
        lt.routing({"r": x}, top_k=5)
    for bad in (-x, np.zeros((1, 4)), np.ones(4)):
        with pytest.raises(FormatError):
            lt.routing({"r": bad})


def test_the_routing_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "r.npz", router=np.array([[1.0, 0.0], [0.5, 0.5]]))
    assert _code(["routing", str(tmp_path / "r.npz"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"]["effective_experts"] == 1.5
    assert _code(["routing", str(tmp_path / "r.npz"), "--fail-on", "effective_experts<1.8", "-q"]) == 1
