"""Readers of what files store: MoSA, AdapterTune, t-few, and the dialects of Uni-LoRA, RandLoRA, PaCA and QWHA."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
from safetensors.numpy import save_file

import loratools as lt
from loratools.core.adapter import Adapter
from loratools.errors import FormatError, LoratoolsError, MissingScaleError, NeedsBaseError, UnsupportedError
from loratools.kinds.lowrank import LowRank
from loratools.linalg.namespace import to_numpy
from loratools.linalg.walsh import table, walsh

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


# MoSA and MoSL


def copies(dice: Dice, shape: tuple[int, ...], count: int) -> tuple[list[Array], Array, list[Array]]:
    """K copies of one start, each moved on its own random share of the entries."""
    start, owner = dice(*shape), np.random.default_rng(3).integers(0, count, shape)
    moves = [(dice(*shape) + 1) * (owner == k) for k in range(count)]
    return [start + move for move in moves], start, moves


def mosl(dice: Dice, count: int = 4, shared: str = "") -> tuple[dict[str, Array], dict[str, tuple[Array, list[Array]]]]:
    tensors, truth = {}, {}
    for role, shape in (("A", (3, 8)), ("B", (8, 3))):
        made, start, moves = copies(dice, shape, count)
        stem = f"transformer.encoder.layer.0.attn.lora_{role}_q"
        if role == shared:
            tensors[f"{stem}.weight"], truth[role] = start, (start, [])
            continue
        tensors |= {f"{stem}.{k}.weight": copy for k, copy in enumerate(made)}
        truth[role] = (start, moves)
    return tensors, truth


QUERY = "transformer.encoder.layer.0.attn.query.weight"


@pytest.mark.parametrize("shared", ["", "A"])
def test_mosl_mean_is_the_released_merge_and_union_the_sum_of_what_was_trained(
    shared: str, read: Read, dice: Dice
) -> None:
    tensors, truth = mosl(dice, shared=shared)
    factors = {role: (f64(start), [f64(m) for m in moves]) for role, (start, moves) in truth.items()}
    mean = {role: start + sum(moves, np.zeros_like(start)) / 4 for role, (start, moves) in factors.items()}
    full = {role: start + sum(moves, np.zeros_like(start)) for role, (start, moves) in factors.items()}
    near(delta(read(tensors), QUERY), mean["B"] @ mean["A"])
    got = delta(read(tensors, said='reader = "mosa"\nsettings = {merge = "union"}'), QUERY)
    near(got, full["B"] @ full["A"], ulps=256)  # differences of copies cancel against their start
    far(got, mean["B"] @ mean["A"])


def test_mosl_union_is_refused_where_the_start_or_the_masks_cannot_be_told(read: Read, dice: Dice) -> None:
    said = 'reader = "mosa"\nsettings = {merge = "union"}'
    two, _ = mosl(dice, count=2)
    with pytest.raises(UnsupportedError, match="two copies"):
        read(two, said=said)
    drifted, _ = mosl(dice)
    key = "transformer.encoder.layer.0.attn.lora_A_q.0.weight"
    drifted[key] = drifted[key] + 0.1  # a copy that moved everywhere: biases, or weight decay
    with pytest.raises(LoratoolsError, match="disjoint"):
        delta(read(drifted, said=said), QUERY)


def test_mosl_says_how_far_a_stored_merge_is(read: Read, dice: Dice) -> None:
    tensors, _ = mosl(dice)
    stem = "transformer.encoder.layer.0.attn.lora_A_q"
    mean = np.mean([tensors[f"{stem}.{k}.weight"] for k in range(4)], axis=0).astype(np.float32)
    good = read({**tensors, f"{stem}_merge.weight": mean})
    assert any("differs from the mean of the copies by" in r and "_merge" in r for r in good.meta.remarks)
    gap = next(float(r.rsplit(" ", 1)[1]) for r in good.meta.remarks if "differs" in r)
    assert gap <= 4 * EPS
    bad = read({**tensors, f"{stem}_merge.weight": mean / 4})  # the released "joint" divides once more
    assert next(float(r.rsplit(" ", 1)[1]) for r in bad.meta.remarks if "differs" in r) > 0.1


def test_mosa_bottlenecks_are_merged_read_and_never_added_to_a_weight(read: Read, dice: Dice, tmp_path: Path) -> None:
    made, start, moves = copies(dice, (4, 8), 4)
    tensors = {f"b.0.adapter_down.{k}.weight": c for k, c in enumerate(made)}
    tensors |= {f"b.0.adapter_down.{k}.bias": dice(4) for k in range(4)}
    tensors |= {"b.0.adapter_up.weight": dice(8, 4), "b.0.adapter_up.bias": dice(8), "b.0.adapter_norm.weight": dice(8)}
    adapter = read(tensors, said='reader = "mosa"\nsettings = {merge = "union"}')
    got = to_numpy(adapter["b.0.adapter_down.weight"].apply(None))
    near(f64(got), f64(start) + f64(sum(moves)), ulps=256)
    bias = np.mean([f64(tensors[f"b.0.adapter_down.{k}.bias"]) for k in range(4)], axis=0)
    near(f64(to_numpy(adapter["b.0.adapter_down.bias"].apply(None))), bias)
    with pytest.raises(UnsupportedError, match="bottleneck"):
        lt.merge({"b.0.fc.weight": dice(8, 8)}, [adapter], tmp_path / "merged.safetensors")


# AdapterTune


def bottleneck(dice: Dice) -> dict[str, Array]:
    at = "blocks.0.adapter"
    return {
        f"{at}.down.weight": dice(3, 8),
        f"{at}.down.bias": dice(3),
        f"{at}.up.weight": dice(8, 3),
        f"{at}.up.bias": dice(8),
    }


def test_adaptertune_is_read_and_refused_where_it_would_be_merged(read: Read, dice: Dice, tmp_path: Path) -> None:
    tensors = bottleneck(dice) | {"blocks.0.block.mlp.fc2.weight": dice(8, 8), "head.weight": dice(2, 8)}
    adapter = read(tensors)
    assert set(adapter) == set(bottleneck(dice))
    assert {u.kind for u in adapter.values()} == {"replace"}
    assert set(adapter.meta.leftover) == {"blocks.0.block.mlp.fc2.weight", "head.weight"}
    with pytest.raises(UnsupportedError, match="activation"):
        lt.merge({"blocks.0.mlp.fc2.weight": dice(8, 8)}, [adapter], tmp_path / "merged.safetensors")


def test_adaptertune_as_its_trainer_saves_it(dice: Dice, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch files need torch")
    tensors = {k: torch.from_numpy(v) for k, v in bottleneck(dice).items()}
    state = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
    torch.save({"model": tensors, "optimizer": state, "epoch": 7}, tmp_path / "best.pt")
    adapter = lt.load(tmp_path / "best.pt")
    assert set(adapter) == set(tensors)
    assert "the state of the training is left out: optimizer" in adapter.meta.remarks


def test_adaptertune_merges_where_it_is_linear(read: Read, dice: Dice) -> None:
    tensors = bottleneck(dice)
    w, b = dice(8, 5), dice(8)
    said = 'reader = "adaptertune"\nsettings = {activation = "identity", alpha = 0.5, host = "mlp.fc2"}'
    adapter = read(tensors, base={"blocks.0.mlp.fc2.weight": w, "blocks.0.mlp.fc2.bias": b}, said=said)
    down, bias, up_, out = (f64(t) for t in tensors.values())

    def forward(x: Array) -> Array:
        y = f64(w) @ x + f64(b)[:, None]
        return y + 0.5 * (up_ @ (down @ y + bias[:, None]) + out[:, None])

    zero = forward(np.zeros((5, 1)))
    near(delta(adapter, "blocks.0.mlp.fc2.weight", w), forward(np.eye(5)) - zero - f64(w))
    near(delta(adapter, "blocks.0.mlp.fc2.bias", b), zero[:, 0] - f64(b))


# t-few


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sides", ["a", "b", "ab"])
def test_tfew_ia3(sides: str, shape: tuple[int, int], read: Read, dice: Dice) -> None:
    w, bias = dice(*shape), dice(shape[0])
    a, b = 1 + dice(1, shape[1]), 1 + dice(shape[0], 1)
    tensors = {f"enc.q.multi_lora_{s}": {"a": a, "b": b}[s] for s in sides}
    adapter = read(tensors, base={"enc.q.weight": w, "enc.q.bias": bias})
    gain = np.ones(shape) * (f64(a) if "a" in sides else 1.0) * (f64(b) if "b" in sides else 1.0)
    near(delta(adapter, "enc.q.weight", w), f64(w) * gain - f64(w))
    if "b" in sides:  # outputs are scaled, the bias among them
        near(delta(adapter, "enc.q.bias", bias), f64(bias) * (f64(b)[:, 0] - 1))
    else:
        assert "enc.q.bias" not in adapter


def test_tfew_of_higher_rank_and_with_lora(read: Read, dice: Dice) -> None:
    w = dice(6, 9)
    parts = {"multi_lora_a": 1 + dice(2, 9), "multi_lora_b": 1 + dice(6, 2), "lora_a": dice(3, 9), "lora_b": dice(6, 3)}
    adapter = read({f"q.{n}": t for n, t in parts.items()}, base={"q.weight": w})
    a, b, la, lb = (f64(t) for t in parts.values())
    want = f64(w) * (b @ a) / 2 + lb @ la / 3 - f64(w)
    near(delta(adapter, "q.weight", w), want)
    far(delta(adapter, "q.weight", w), f64(w) * (b @ a) - f64(w) + lb @ la)  # without the divisions by the ranks


def test_tfew_needs_a_shape(read: Read, dice: Dice) -> None:
    with pytest.raises(NeedsBaseError):
        read({"q.multi_lora_b": dice(6, 1)})


# Uni-LoRA


def test_unilora_of_understanding_tasks(read: Read, dice: Dice) -> None:
    rng = np.random.default_rng(0)
    bank, a, b = dice(20), rng.integers(0, 20, (14, 3)), rng.integers(0, 20, (3, 9))
    norms = [np.abs(dice(14, 3)), np.abs(dice(3, 9))]
    tensors = {"q.vector_bank": bank, "q.project_params_A": a, "q.project_params_B": b, "q.norm_factor_A": norms[0],
               "q.norm_factor_B": norms[1]}  # fmt: skip
    left, right = f64(bank)[a] * norms[0], f64(bank)[b] * norms[1]
    got = delta(read(tensors), "q.weight")
    near(got, (left @ right).T)  # y += x A B
    far(got, ((f64(bank)[a]) @ (f64(bank)[b])).T)  # without the norms


def test_unilora_of_the_authors_fork_of_peft(read: Read, dice: Dice) -> None:
    rng, at = np.random.default_rng(0), "base_model.model.m.q"
    bank, a, b = dice(20), rng.integers(0, 20, (3, 14)), rng.integers(0, 20, (9, 3))
    norms = [np.abs(dice(3, 14)), np.abs(dice(9, 3))]
    tensors = {f"{at}.unilora_logits_A": a, f"{at}.unilora_logits_B": b, f"{at}.unilora_norm_A": norms[0],
               f"{at}.unilora_norm_B": norms[1], "base_model.unilora_vector_bank": bank}  # fmt: skip
    adapter = read(tensors, config={"peft_type": "UNILORA", "r": 3, "target_modules": ["q"]})
    near(delta(adapter, "m.q.weight"), (f64(bank)[b] * norms[1]) @ (f64(bank)[a] * norms[0]))


# RandLoRA


@pytest.mark.parametrize("shape", SHAPES)
def test_randlora_of_the_authors_fork_of_peft(shape: tuple[int, int], read: Read, dice: Dice) -> None:
    width, r, n = shape[1], 3, 4
    least, most = min(shape), max(shape)
    rows, gamma, a, b = dice(r, n), dice(n, least), dice(r, 1, most), dice(most + 2, n + 1, r)
    at = "base_model.model.q"
    tensors = {f"{at}.randlora_lambda": rows, f"{at}.randlora_gamma": gamma, "base_model.randbasis_A": a,
               "base_model.randbasis_B": b}  # fmt: skip
    config = {"peft_type": "RANDLORA", "r": r, "randlora_alpha": 6, "target_modules": ["q"]}
    got = delta(read(tensors, config=config, base={"q.weight": dice(*shape)}), "q.weight")
    product = np.zeros((most, least))
    for flat in range(n * r):  # as coded, the two flattenings pair different indices
        i, j = divmod(flat, r)  # of B: base, rank
        k, m = divmod(flat, n)  # of A: rank, base
        product += np.outer(f64(b)[:most, i, j], f64(rows)[k, m] * f64(a)[k, 0, :least] * f64(gamma)[m])
    want = 6 / r / np.sqrt(n) * (product if least == width else product.T)
    near(got, want)
    far(got, np.sqrt(n) * want)  # PEFT's own scale
    plain = np.einsum("mnr,rn,rk,nk->mk", f64(b)[:most, :n], f64(rows), f64(a)[:, 0, :least], f64(gamma))
    far(got, 6 / r / np.sqrt(n) * (plain if least == width else plain.T))  # pairing equal indices, as the paper does


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shared", [True, False])
def test_randlora_of_the_first_code(shared: bool, shape: tuple[int, int], read: Read, dice: Dice) -> None:
    r, n, least, most = 2, 5, min(shape), max(shape)
    rows, gamma, a, b = dice(n, r), dice(n, least), dice(1 if shared else n, r, most), dice(n, most, r)
    tensors = {f"h.0.{leaf}": t for leaf, t in zip(
        ("randlora_lambda", "randlora_gamma", "basis_a", "basis_b"), (rows, gamma, a, b), strict=True)}  # fmt: skip
    got = delta(
        read(tensors, base={"h.0.weight": dice(*shape)}, said='reader = "randlora"\nsettings = {alpha = 4}'),
        "h.0.weight",
    )
    product = np.zeros((most, least))
    for flat in range(n * r):
        i, j = divmod(flat, r)
        k, m = divmod(flat, n)
        product += np.outer(
            f64(b)[i, :most, j], f64(rows)[m, k] * f64(a)[0 if shared else m, k, :least] * f64(gamma)[m]
        )
    want = 4 / r / np.sqrt(n) * product.reshape(shape)  # a view, whatever the orientation
    near(got, want)
    if shape[0] < shape[1]:
        far(got, 4 / r / np.sqrt(n) * product.T)
    with pytest.raises(MissingScaleError):
        read(tensors, base={"h.0.weight": dice(*shape)})


# PaCA


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("turned", [False, True])
def test_paca_columns_are_absolute(turned: bool, shape: tuple[int, int], read: Read, dice: Dice) -> None:
    w, places = dice(*shape), np.array([5, 0, 7])
    columns = dice(shape[0], 3)
    tensors = {"base_model.model.q.paca_w": columns, "base_model.model.q.paca_indices": places}
    config = {"peft_type": "PACA", "r": 3, "paca_alpha": 6, "target_modules": ["q"], "fan_in_fan_out": turned}
    stored = np.ascontiguousarray(w.T) if turned else w
    adapter = read(tensors, config=config, base={"q.weight": stored})
    after = f64(w)
    after[:, places] = 2 * f64(columns)  # W'[:, i] = s paca_w
    want = after - f64(w)
    got = delta(adapter, "q.weight")
    near(got, want.T if turned else want)
    naive = np.zeros_like(want)
    naive[:, places] = 2 * f64(columns)  # without subtracting W
    far(got, naive.T if turned else naive)
    assert isinstance(adapter["q.weight"], LowRank)
    with pytest.raises(NeedsBaseError):
        read(tensors, config=config)


def test_paca_refuses_places_that_repeat(read: Read, dice: Dice) -> None:
    tensors = {"base_model.model.q.paca_w": dice(4, 2), "base_model.model.q.paca_indices": np.array([1, 1])}
    config = {"peft_type": "PACA", "r": 2, "paca_alpha": 2, "target_modules": ["q"]}
    with pytest.raises(FormatError, match="repeat"):
        delta(read(tensors, config=config, base={"q.weight": dice(4, 6)}), "q.weight")


# QWHA


def hadamard64(n: int) -> Array:
    """K and its power of two by Kronecker products; Paley's constructions by Euler's criterion, written out again."""
    k = next(k for k in (60, 36, 28, 40, 20, 12, 1) if n % k == 0)
    first = scipy.linalg.hadamard(2) if k == 40 else np.eye(1)
    q = {60: 59, 40: 19, 20: 19, 12: 11, 28: 13, 36: 17}.get(k)
    if q is not None:
        chi = np.array([0] + [1 if pow(x, (q - 1) // 2, q) == 1 else -1 for x in range(1, q)])
        jacobsthal = chi[(np.arange(q)[None, :] - np.arange(q)[:, None]) % q]
        one, ones = np.ones((1, 1)), np.ones((q, 1))
        paley = np.block([[one, -ones.T], [ones, np.eye(q) - jacobsthal]])
        if k in (28, 36):
            c, i = np.block([[0 * one, ones.T], [ones, jacobsthal]]), np.eye(q + 1)
            paley = np.block([[c + i, c - i], [c - i, -c - i]])
        first = np.kron(first, paley)
    return np.kron(first, scipy.linalg.hadamard(n // k))


@pytest.mark.parametrize("n", [1, 2, 16, 12, 24, 20, 40, 80, 96, 28, 112, 36, 60, 120])
def test_hadamard_matrices(n: int) -> None:
    h = walsh(np.eye(n))
    assert np.array_equal(h @ h.T, n * np.eye(n))
    assert np.array_equal(h, hadamard64(n))


def test_the_tables_are_those_of_quarot() -> None:
    """Second rows as published; a table of another convention would be a Hadamard matrix all the same."""
    assert table(12)[1] == (1, 1, -1, 1, -1, -1, -1, 1, 1, 1, -1, 1)
    assert table(20)[1] == (1, 1, -1, 1, 1, -1, -1, -1, -1, 1, -1, 1, -1, 1, 1, 1, 1, -1, -1, 1)
    assert table(40)[20] == (1, *(-1,) * 19, -1, *(1,) * 19)
    assert table(28)[1][:14] == (1, 1, 1, -1, 1, 1, -1, -1, -1, -1, 1, 1, -1, 1)
    assert table(28)[15] == (
        *(1, -1, 1, -1, 1, 1, -1, -1, -1, -1, 1, 1, -1, 1), *(-1, -1, -1, 1, -1, -1, 1, 1, 1, 1, -1, -1, 1, -1),
    )  # fmt: skip
    assert table(36)[1][:18] == (1, 1, 1, 1, -1, 1, -1, -1, -1, 1, 1, -1, -1, -1, 1, -1, 1, 1)
    assert table(36)[19][18:27] == (-1, -1, -1, -1, 1, -1, 1, 1, 1)
    assert table(60)[1][:20] == (1, 1, -1, 1, -1, -1, -1, 1, -1, 1, -1, 1, 1, -1, 1, 1, -1, -1, -1, 1)


@pytest.mark.parametrize("prefix", ["qhft", "qwha"])
@pytest.mark.parametrize("shape", [(9, 24), (24, 16), (12, 12)])
def test_qwha(shape: tuple[int, int], prefix: str, read: Read, dice: Dice) -> None:
    (out, width), rng = shape, np.random.default_rng(4)
    flat = rng.choice(out * width, 15, replace=False)
    places, spectrum = np.stack([flat // width, flat % width]), dice(15)
    at = f"base_model.model.q.{prefix}"
    tensors = {f"{at}_spectrum": spectrum, f"{at}_indices_default": places}
    tensors |= {f"{at}_random_loc_seed_default": np.array(777), f"{at}_n_frequency_default": np.array(15)}
    tensors |= {f"{at}_scaling_default": np.array(150.0, np.float32)}
    config = {"peft_type": prefix.upper(), "target_modules": ["q"]}
    adapter = read(tensors, config=config, base={"q.weight": dice(*shape)})
    f, h = np.zeros(shape), hadamard64(width)
    f[places[0], places[1]] = spectrum
    got = delta(adapter, "q.weight")
    near(got, 150 / (width * np.sqrt(out)) * f @ h)
    if width == 24:  # the table is not symmetric: the sense of the product counts
        far(got, 150 / (width * np.sqrt(out)) * f @ h.T)
    far(got, 150 / np.sqrt(out) * f)  # what the code's own merge adds
    assert np.isclose(np.linalg.norm(got), 150 * np.linalg.norm(spectrum) / np.sqrt(width * out), rtol=1e-6)  # Parseval


def test_qwha_refuses_sizes_without_a_known_table(read: Read, dice: Dice) -> None:
    at = "base_model.model.q.qwha"
    tensors = {f"{at}_spectrum": dice(2), f"{at}_indices_default": np.array([[0, 1], [2, 3]]),
               f"{at}_scaling_default": np.array(1.0, np.float32)}  # fmt: skip
    for n in (52, 84, 108, 140, 156, 172, 11008):
        with pytest.raises(UnsupportedError, match="Hadamard"):
            read(
                tensors,
                config={"peft_type": "QWHA", "target_modules": ["q"]},
                base={"q.weight": np.zeros((4, n), np.float32)},
            )


# LoRA-XS


def test_lora_xs_folds_its_core_and_ignores_the_side_file(dice: Dice, tmp_path: Path) -> None:
    a, b, core = dice(3, 10), dice(7, 3), dice(3, 3)
    for key in (
        "q_proj_lora_latent_mapping.weight",
        "q_proj.default_lora_latent_mapping.weight",
    ):  # older, newer savers
        folder = tmp_path / key.partition("_lora")[0].replace(".", "-")
        folder.mkdir()
        at = "base_model.model.model.layers.0"
        tensors = {f"{at}.q_proj.lora_A.weight": a, f"{at}.q_proj.lora_B.weight": b, f"{at}.{key}": core}
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj"]})
        )
        (folder / "reconstr_config.json").write_text(json.dumps({"reconstruction_type": "svd", "svd": {"n_iter": 10}}))
        adapter = lt.load(folder)
        got = delta(adapter, "model.layers.0.q_proj.weight")
        near(got, 2 * f64(b) @ f64(core) @ f64(a))
        far(got, 2 * f64(b) @ f64(a))  # without the core
        assert "reconstr_config.json" in [p.name for p in adapter.meta.siblings]


def test_unknown_dialects_are_refused_with_what_was_found(read: Read, dice: Dice) -> None:
    with pytest.raises(FormatError, match=r"q\.other_thing"):
        read({"q.other_thing": dice(3, 3)})
    with pytest.raises(FormatError, match="no known reader"):
        read({"q.other_thing": dice(3, 3)}, said='reader = "tera"')
    tensors = {"q.project_params_A": np.zeros((4, 2), np.int64), "q.vector_bank": dice(5)}
    with pytest.raises(FormatError, match="project_params_B"):
        read(tensors)


DAMAGED: dict[str, dict[str, Array]] = {
    "a vector of copies": {f"a.lora_A_q.{k}.weight": np.ones(3, np.float32) for k in range(3)},
    "half of copies": {f"a.lora_A_q.{k}.weight": np.ones((2, 3), np.float32) for k in range(3)},
    "a flat lambda": {f"h.{n}": np.ones(3, np.float32)
                      for n in ("randlora_lambda", "randlora_gamma", "basis_a", "basis_b")},
    "a flat bottleneck": {f"blocks.0.adapter.{n}": np.ones(3, np.float32)
                          for n in ("down.weight", "down.bias", "up.weight", "up.bias")},
    "flat points": {f"a.additional_q.learnable.{n}": np.ones(3, np.float32)
                    for n in ("In_Qs", "Out_Qs", "shared_coeff_fc")},
    "flat X": {"q.weight": np.ones((4, 5), np.float32), "q.trainable_scale_A": np.ones(2, np.float32),
               "q.trainable_shift_B": np.ones(2, np.float32), "q.trainable_X": np.ones(2, np.float32),
               "q.trainable_Y": np.ones(2, np.float32)},
    "one branch": {"b.mlp.hydra_mlp_par.down_proj.weight": np.ones((2, 3), np.float32)},
    "a flat vector": {"q.multi_lora_b": np.ones(3, np.float32)},
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_checkpoints_are_refused_not_guessed(case: str, read: Read) -> None:
    with pytest.raises(LoratoolsError):
        read(DAMAGED[case], base={"h.weight": np.ones((3, 3), np.float32), "q.weight": np.ones((4, 5), np.float32)})


def test_places_outside_the_bank_are_an_error(read: Read, dice: Dice) -> None:
    places = np.array([[0, 7], [1, 2], [3, 4]])
    tensors = {"q.vector_bank": dice(5), "q.project_params_A": places, "q.project_params_B": np.zeros((2, 4), np.int64),
               "q.norm_factor_A": dice(3, 2), "q.norm_factor_B": dice(2, 4)}  # fmt: skip
    with pytest.raises(FormatError, match="outside"):
        delta(read(tensors), "q.weight")
