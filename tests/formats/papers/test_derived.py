"""Readers whose update follows from the base or from a network: LoLDU, SALT, Hydra, SNELL, HypeLoRA, S2FT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.special

from loratools.core.adapter import Adapter
from loratools.errors import (
    FormatError,
    MismatchError,
    MissingScaleError,
    NeedsBaseError,
    UnsupportedError,
    UsageError,
)
from loratools.kinds.lowrank import LowRank, low_rank
from loratools.linalg.namespace import to_numpy

Array = np.ndarray[Any, Any]
Dice = Callable[..., Array]
Read = Callable[..., Adapter]
EPS = float(np.finfo(np.float32).eps)
SHAPES = [(9, 14), (14, 9), (10, 10)]


def delta(adapter: Adapter, name: str, w: Array | None = None) -> Array:
    """W' - W in float64; the base is given in float64, so that nothing is rounded but the factors."""
    u = adapter[name]
    base = None if w is None else w.astype(np.float64)
    return to_numpy(u.delta(base).dense()).astype(np.float64)  # type: ignore[arg-type]


def near(got: Array, want: Array, *, ulps: float = 64) -> None:
    """Factors are kept in fp32: a few roundings of the largest entry of sums of fewer than 64 terms."""
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= ulps * EPS * np.abs(want).max()


def far(got: Array, wrong: Array) -> None:
    """The naive reading is another matrix, by far more than rounding."""
    assert np.linalg.norm(got - wrong) > 0.05 * np.linalg.norm(wrong)


def f64(x: Array) -> Array:
    return x.astype(np.float64)


# LoLDU: W = P L D U, D' = z


@pytest.mark.parametrize("shape", SHAPES)
def test_loldu(shape: tuple[int, int], read: Read, dice: Dice) -> None:
    w, z = dice(*shape), dice(4)
    key = "model.layer.parametrizations.weight.0.vector_z"
    adapter = read({key: z}, base={"model.layer.weight": w}, said='reader = "loldu"\nsettings = {alpha = 8}')
    p, left, upper = scipy.linalg.lu(w)  # of the fp32 weight, as torch.linalg.lu sees it
    p, left, upper = f64(p), f64(left), f64(upper)
    d = np.diag(upper)
    unit = upper / d[:, None]
    assert np.allclose(p @ left @ np.diag(d) @ unit, w, atol=1e-5)
    after = d.copy()
    after[:4] = f64(z)
    want = 8 / 4 * (p @ left @ np.diag(after) @ unit - p @ left @ np.diag(d) @ unit)
    got = delta(adapter, "model.layer.weight")
    near(got, want)
    far(got, 2.0 * (p @ left)[:, :4] @ np.diag(f64(z)) @ unit[:4])  # the residual subtracts the original diagonal
    assert isinstance(adapter["model.layer.weight"], LowRank)
    assert adapter["model.layer.weight"].rank == 4


def test_loldu_needs_what_its_files_lack(read: Read, dice: Dice) -> None:
    tensors = {"a.parametrizations.weight.0.vector_z": dice(3)}
    with pytest.raises(NeedsBaseError):
        read(tensors)
    with pytest.raises(MissingScaleError, match="alpha"):
        read(tensors, base={"a.weight": dice(5, 6)})
    with pytest.raises(UsageError, match="no such setting"):
        read(tensors, base={"a.weight": dice(5, 6)}, said='reader = "loldu"\nsettings = {rank = 3}')
    scaling = {"a.parametrizations.weight.0.scaling_factor": np.full(1, 2, np.float32)}
    assert read({**tensors, **scaling}, base={"a.weight": dice(5, 6)})["a.weight"].scale == 2.0  # type: ignore[attr-defined]


# SALT: U relu(N) V^T


@pytest.mark.parametrize("shape", [*SHAPES, (6, 3, 2, 2)])
def test_salt_and_its_relu_and_signs(shape: tuple[int, ...], read: Read, dice: Dice) -> None:
    w, k, r = dice(*shape), 3, 2
    m = min(shape[0], int(np.prod(shape[1:])))
    parts = {"scale_A": 1 + dice(k), "shift_B": 0.3 * dice(k), "X": dice(m - k, r), "Y": dice(r, m - k)}
    tensors = {"enc.q.weight": w, **{f"enc.q.trainable_{n}": t for n, t in parts.items()}, "enc.norm.weight": dice(4)}
    adapter = read(tensors)
    u, s, vh = np.linalg.svd(w.reshape(shape[0], -1), full_matrices=False)  # signs are those of fp32's own routine
    u, s, vh = f64(u), f64(s), f64(vh)
    a, b, x, y = (f64(t) for t in parts.values())
    n = scipy.linalg.block_diag(np.diag(a * s[:k] + b), np.diag(s[k:]) + x @ y)
    want = u @ np.maximum(n, 0) @ vh - u @ np.diag(s) @ vh
    got = delta(adapter, "enc.q.weight").reshape(shape[0], -1)
    near(got, want)
    far(got, u @ n @ vh - u @ np.diag(s) @ vh)  # the formula of the paper, without the relu of the code
    flip = np.ones(m)
    off = np.maximum(n[k:, k:], 0) * (1 - np.eye(m - k))
    flip[k + int(np.argmax(off.sum(axis=0) + off.sum(axis=1)))] = -1  # one pair of singular vectors with the other sign
    flipped = (u * flip) @ (np.maximum(n, 0) - np.diag(s)) @ (flip[:, None] * vh)
    far(got, flipped)
    assert any("sign" in remark for remark in adapter.meta.remarks)
    assert "enc.norm.weight" in adapter.meta.leftover


def test_salt_takes_the_base_where_the_file_has_no_weight(read: Read, dice: Dice) -> None:
    w = dice(6, 8)
    tensors = {"q.trainable_scale_A": dice(2), "q.trainable_shift_B": dice(2), "q.trainable_X": dice(4, 1),
               "q.trainable_Y": dice(1, 4)}  # fmt: skip
    inside = read({**tensors, "q.weight": w})
    assert np.array_equal(delta(read(tensors, base={"q.weight": w}), "q.weight"), delta(inside, "q.weight"))
    with pytest.raises(NeedsBaseError):
        read(tensors)


def test_salt_refuses_other_dialects_by_name(read: Read, dice: Dice) -> None:
    tensors = {"q.weight": dice(6, 8), "q.trainable_scale_A": dice(6), "q.trainable_shift_B": dice(6),
               "q.trainable_X": dice(6, 2), "q.trainable_Y": dice(2, 6)}  # fmt: skip
    with pytest.raises(UnsupportedError, match="X of 0 rows"):
        read(tensors)
    with pytest.raises(UnsupportedError, match="trainable_rank_threshold"):
        read({**tensors, "q.trainable_rank_threshold": dice(1)})


# Hydra: two linear branches, three layouts


def branch(dice: Dice, out: int, width: int, r: int) -> tuple[Array, Array, Array, Array]:
    return dice(r, width), dice(r), dice(out, r), dice(out)


def hydra_want(w: Array, b: Array, par: Any, seq: Any, s: float) -> tuple[Array, Array]:
    """W' and b' by feeding unit vectors through the network of the paper."""

    def forward(x: Array) -> Array:
        y = w @ x + b[:, None]
        dp, bp, up, cp = par
        ds, bs, us, cs = seq
        return (  # type: ignore[no-any-return]
            y + s * (up @ (dp @ x + bp[:, None]) + cp[:, None]) + s * (us @ (ds @ y + bs[:, None]) + cs[:, None])
        )

    bias = forward(np.zeros((w.shape[1], 1)))
    return forward(np.eye(w.shape[1])) - bias, bias[:, 0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["timm", "clip"])
def test_hydra_with_biases(layout: str, shape: tuple[int, int], read: Read, dice: Dice) -> None:
    (out, width), w, b = shape, dice(*shape), dice(shape[0])
    par, seq = branch(dice, out, width, 3), branch(dice, out, out, 2)
    stems = {"timm": "blocks.0.mlp.hydra_mlp_{}", "clip": "blocks.0.mlp.ad_lin.adapter_{}"}[layout]
    host = {"timm": "blocks.0.mlp.fc2", "clip": "blocks.0.mlp.c_proj"}[layout]
    said = "settings = {scale = 0.4}" if layout == "timm" else 'settings = {host = "c_proj"}'
    names = ("down_proj.weight", "down_proj.bias", "up_proj.weight", "up_proj.bias")
    tensors = {
        f"{stems.format(side)}.{n}": t
        for side, p in (("par", par), ("seq", seq))
        for n, t in zip(names, p, strict=True)
    }
    if layout == "clip":  # learnable there
        tensors |= {f"{stems.format(side)}.scale": np.full(1, 0.4, np.float32) for side in ("par", "seq")}
    base = {f"{host}.weight": w, f"{host}.bias": b}
    adapter = read(tensors, base=base, said=f'reader = "hydra"\n{said}')
    s = float(np.float32(0.4)) if layout == "clip" else 0.4
    new, bias = hydra_want(f64(w), f64(b), tuple(map(f64, par)), tuple(map(f64, seq)), s)
    near(delta(adapter, f"{host}.weight", w), new - f64(w))
    near(delta(adapter, f"{host}.bias", b), bias - f64(b))
    through_w = new - f64(w)
    far(through_w, s * f64(par[2]) @ f64(par[0]))  # without the branch behind the layer
    found = low_rank(adapter[f"{host}.weight"].delta(w))
    assert found is not None
    assert found.rank == 5


def test_hydra_on_the_attention_and_in_the_layout_of_language_models(read: Read, dice: Dice) -> None:
    w = dice(8, 8)
    down, up_ = dice(2, 8), dice(8, 2)
    tensors = {"enc.out.hydra_seq.hydra_A.weight": down, "enc.out.hydra_seq.hydra_B.weight": up_}
    with pytest.raises(UnsupportedError, match="hosts"):
        read(tensors)
    said = 'reader = "hydra"\nsettings = {hosts = {hydra_seq = ["dense", "seq"]}}'
    adapter = read(tensors, base={"enc.out.dense.weight": w, "enc.out.dense.bias": dice(8)}, said=said)
    near(delta(adapter, "enc.out.dense.weight", w), f64(up_) @ f64(down) @ f64(w))
    bias = dice(8)
    near(delta(adapter, "enc.out.dense.bias", bias), f64(up_) @ f64(down) @ f64(bias))
    names = ("down_proj.weight", "down_proj.bias", "up_proj.weight", "up_proj.bias")
    par = {f"blocks.3.attn.hydra_proj_par.{n}": t for n, t in zip(names, branch(dice, 8, 8, 2), strict=True)}
    with pytest.raises(MissingScaleError, match="scale"):
        read(par)
    assert "blocks.3.attn.proj.weight" in read(par, said='reader = "hydra"\nsettings = {scale = 1}')


# SNELL


def kernel64(inner: Array, outer: Array, c: Array, p: float) -> Array:
    k = np.zeros((inner.shape[1], outer.shape[1]))
    for h, i, o in np.ndindex(inner.shape[0], inner.shape[1], outer.shape[1]):
        k[i, o] += f64(c)[h, 0, 0] * (np.abs(f64(inner)[h, i] - f64(outer)[h, o]) ** p).sum() ** (1 / p)
    return k


def snell_parts(dice: Dice, out: int, width: int) -> dict[str, Array]:
    c = np.array([0.1, -0.1], np.float32).reshape(2, 1, 1)
    return {"In_Qs": dice(2, width, 4), "Out_Qs": dice(2, out, 4), "shared_coeff_fc": c}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_snell_multiplies_by_the_size_it_does_not_only_mask(
    shape: tuple[int, int], p: float, read: Read, dice: Dice
) -> None:
    parts = snell_parts(dice, *shape)
    tensors = {f"blocks.0.attn.additional_q.learnable.{n}": t for n, t in parts.items()}
    said = f'reader = "snell"\nsettings = {{variant = "snell", norm_p = {p}, threshold = 0.7}}'
    k = kernel64(*parts.values(), p)  # type: ignore[arg-type]
    t = np.sort(np.abs(k).ravel())[int(np.floor(0.7 * (k.size - 1))) :][:2]
    t = t[0] + (0.7 * (k.size - 1) % 1) * (t[1] - t[0])  # linear between the two entries around the quantile
    want = (k * np.abs(k) * (np.abs(k) > t)).T
    got = delta(read(tensors, said=said), "blocks.0.attn.q.weight")
    near(got, want)
    far(got, (k * (np.abs(k) > t)).T)  # a plain mask
    assert abs((got != 0).mean() - 0.3) < 0.02


def test_klora_keeps_everything(read: Read, dice: Dice) -> None:
    parts = snell_parts(dice, 5, 7)
    tensors = {f"b.additional_proj.learnable.{n}": t for n, t in parts.items()}
    got = delta(read(tensors, said='reader = "snell"\nsettings = {variant = "klora", norm_p = 2}'), "b.proj.weight")
    near(got, kernel64(*parts.values(), 2.0).T)  # type: ignore[arg-type]


def test_snella_adds_a_softmax_and_reads_its_thresholds(read: Read, dice: Dice, tmp_path: Path) -> None:
    parts = snell_parts(dice, 6, 5)
    more = {"alpha": 0.5, "gamma": 0.7, "beta": -0.02}
    tensors = {f"blocks.1.attn.additional_v.learnable.{n}": t for n, t in parts.items()}
    tensors |= {f"blocks.1.attn.additional_v.learnable.{n}": np.full(1, x, np.float32) for n, x in more.items()}
    (tmp_path / "alloc.json").write_text(json.dumps({"blocks.1.attn.v": 0.5, "blocks.1.attn.q": 0.1}))
    said = 'reader = "snell"\nfiles = {thresholds = "alloc.json"}'
    k = kernel64(*parts.values(), 2.0)  # type: ignore[arg-type]
    alpha, gamma, beta = (float(np.float32(x)) for x in more.values())
    e = np.exp(k / gamma)
    k = k + alpha * e / e.sum(axis=1, keepdims=True) + beta
    t = np.median(np.abs(k))
    got = delta(read(tensors, said=said), "blocks.1.attn.v.weight")
    near(got, (k * np.abs(k) * (np.abs(k) > t)).T)
    with pytest.raises(MissingScaleError, match="threshold"):
        read(tensors)
    (tmp_path / "alloc.json").write_text(json.dumps({"blocks.7.attn.v": 0.5}))
    with pytest.raises(FormatError, match="does not say this layer"):
        read(tensors, said=said)


# HypeLoRA


def hyper(dice: Dice, width: int, rank: int, halves: int, *, deep: bool = False) -> dict[str, Array]:
    sizes = [(6, 5)] + [(5, 5)] * (2 if deep else 0) + [(5, halves * rank * width)]
    net = {f"fc{i + 1}.weight": dice(out, n) for i, (n, out) in enumerate(sizes)}
    net |= {f"fc{i + 1}.bias": dice(out) for i, (_, out) in enumerate(sizes)}
    return net | {"embedding.weight": dice(4, 6)}


def placed(net: dict[str, Array], dice: Dice, width: int, rank: int) -> dict[str, Array]:
    tensors: dict[str, Array] = {}
    for layer in (2, 10):  # text would sort 10 first
        for p in ("query", "value"):
            at = f"base_model.model.roberta.encoder.layer.{layer}.attention.self.{p}.lora_A.default"
            tensors |= {f"{at}.hypernet.{n}": t for n, t in net.items()}
            tensors |= {f"{at}.initial_A": dice(width, rank), f"{at}.initial_B": dice(rank, width)}
    return tensors


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("order", ["BA", "AB"])
def test_hypelora_generated(order: str, deep: bool, read: Read, dice: Dice) -> None:
    width, rank = 8, 2
    net = hyper(dice, width, rank, 2, deep=deep)
    said = f'reader = "hypelora"\nsettings = {{alpha = 16, activation = "relu", mode = "generated", order = "{order}"}}'
    adapter = read(placed(net, dice, width, rank), said=said)
    x = f64(net["embedding.weight"])[2]  # the embeddings: query of 2, of 10, value of 2, of 10
    count = 4 if deep else 2
    for i in range(1, count + 1):
        x = f64(net[f"fc{i}.weight"]) @ x + f64(net[f"fc{i}.bias"])
        x = np.maximum(x, 0) if i < count else x
    halves = {side: x[i * 16 : (i + 1) * 16] for i, side in enumerate(order)}
    a, b = halves["A"].reshape(width, rank), halves["B"].reshape(rank, width)
    got = delta(adapter, "roberta.encoder.layer.2.attention.self.value.weight")
    near(got, 16 / 2 * (a @ b).T)  # y = x A B
    far(got, 8 * a @ b)


def test_hypelora_fixed_and_blended(read: Read, dice: Dice) -> None:
    width, rank = 8, 2
    net = hyper(dice, width, rank, 1)
    tensors = placed(net, dice, width, rank) | {f"A.{i}": dice(width, rank) for i in range(4)}
    words = 'alpha = 2, activation = "gelu", mode = "fixed", blend_B = "add", noise = 0.25, blend_A = "multiply"'
    said = f'reader = "hypelora"\nsettings = {{{words}}}'
    adapter = read(tensors, said=said)
    x = f64(net["fc1.weight"]) @ f64(net["embedding.weight"])[1] + f64(net["fc1.bias"])
    x = 0.5 * x * (1 + scipy.special.erf(x / np.sqrt(2)))
    b = (f64(net["fc2.weight"]) @ x + f64(net["fc2.bias"])).reshape(rank, width)
    at = "base_model.model.roberta.encoder.layer.10.attention.self.query.lora_A.default"
    b = 0.75 * b + 0.25 * f64(tensors[f"{at}.initial_B"])
    a = f64(tensors["A.1"]) * f64(tensors[f"{at}.initial_A"])
    near(delta(adapter, "roberta.encoder.layer.10.attention.self.query.weight"), (a @ b).T)


def test_hypelora_refuses_what_no_file_says(read: Read, dice: Dice) -> None:
    tensors = placed(hyper(dice, 8, 2, 1), dice, 8, 2)
    with pytest.raises(FormatError, match="mode"):
        read(tensors)
    for mode, what in (("random", "anew"), ("fixed", "not in HypeLoRA"), ("generated", "order")):
        with pytest.raises(FormatError, match=what):
            read(tensors, said=f'reader = "hypelora"\nsettings = {{alpha = 2, activation = "relu", mode = "{mode}"}}')


# S2FT


def s2ft_model(dice: Dice, heads: int = 4) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
    """(base, the fused and permuted checkpoint, the true differences)."""
    sizes = {"mlp.gate_proj": (12, 8), "mlp.up_proj": (12, 8), "mlp.down_proj": (8, 12)}
    sizes |= {f"self_attn.{p}_proj": (8, 8) for p in "qkvo"}
    base = {f"model.layers.0.{n}.weight": dice(*s) for n, s in sizes.items()} | {"model.norm.weight": dice(8)}
    true = {name: np.zeros_like(w) for name, w in base.items()}
    true["model.layers.0.mlp.up_proj.weight"][[2, 7]] = dice(2, 8)
    true["model.layers.0.mlp.down_proj.weight"][:, [7, 9]] = dice(8, 2)
    true["model.layers.0.self_attn.v_proj.weight"][2:4] = dice(2, 8)
    true["model.layers.0.self_attn.o_proj.weight"][:, 6:8] = dice(8, 2)
    channels, blocks = np.random.default_rng(1).permutation(12), np.random.default_rng(2).permutation(heads)
    rows = (blocks[:, None] * (8 // heads) + np.arange(8 // heads)).ravel()
    tuned = {name: w + true[name] for name, w in base.items()}
    for n, w in list(tuned.items()):
        order = channels if ".mlp." in n else rows
        if "norm" not in n:
            tuned[n] = w[:, order] if n.endswith(("down_proj.weight", "o_proj.weight")) else w[order]
    return base, tuned, {n: tuned_exact(base[n], true[n]) for n in base}


def tuned_exact(w: Array, d: Array) -> Array:
    return f64(w + d) - f64(w)


def test_s2ft_recovers_the_permutation_from_frozen_rows(read: Read, dice: Dice) -> None:
    base, tuned, true = s2ft_model(dice)
    adapter = read(tuned, base=base, said='reader = "s2ft"\nsettings = {heads = 4}')
    assert set(adapter) == {name for name, d in true.items() if d.any()}
    for name in adapter:
        near(delta(adapter, name), true[name])
        far(delta(adapter, name), f64(tuned[name]) - f64(base[name]))  # subtracting without the permutation
        assert isinstance(adapter[name], LowRank)
        assert adapter[name].rank == 2


def test_s2ft_refuses_where_the_frozen_rows_do_not_match(read: Read, dice: Dice) -> None:
    base, tuned, _ = s2ft_model(dice)
    said = 'reader = "s2ft"\nsettings = {heads = 4}'
    with pytest.raises(UnsupportedError, match="number of heads"):
        read(tuned, base=base, said='reader = "s2ft"')
    moved = dict(tuned)
    moved["model.norm.weight"] = dice(8)
    with pytest.raises(UnsupportedError, match="outside heads and channels"):
        read(moved, base=base, said=said)
    moved = dict(tuned)
    moved["model.layers.0.mlp.gate_proj.weight"] = dice(12, 8)
    with pytest.raises(MismatchError, match="cannot be recovered"):
        read(moved, base=base, said=said)
    grouped = {**tuned, "model.layers.0.self_attn.k_proj.weight": dice(4, 8)}
    with pytest.raises(UnsupportedError, match="grouped"):
        read(grouped, base={**base, "model.layers.0.self_attn.k_proj.weight": dice(4, 8)}, said=said)
