"""Manifests: every worked example of docs/manifest.md, against the paper's definition in float64."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import loratools as lt
from loratools.core.update import Delta
from loratools.errors import ConversionError, FormatError, MismatchError, UnsupportedError
from loratools.files import save
from loratools.kinds.lowrank import LowRank, low_rank
from loratools.linalg.namespace import to_numpy

PAGE = Path(__file__).parents[2] / "docs" / "manifest.md"
Tensors = dict[str, np.ndarray[Any, Any]]
RNG = np.random.default_rng(5)
EPS = float(np.finfo(np.float32).eps)


def dice(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.standard_normal(shape).astype(np.float32)


def example(heading: str) -> str:
    """The TOML block under a heading of the page: what readers copy is what is tested."""
    found = re.search(rf"^## {re.escape(heading)}.*?```toml\n(.*?)```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert found, heading
    return found[1]


def written(folder: Path, toml: str, tensors: Tensors) -> Path:
    save_file(tensors, folder / "weights.safetensors")
    path = folder / "adapter.toml"
    path.write_text(toml)
    return path


def inline(body: str) -> str:
    return f'manifest = 1\nweights = "weights.safetensors"\n{body}'


def dense(adapter: Any, name: str) -> np.ndarray[Any, Any]:
    u = adapter[name]
    assert isinstance(u, Delta)
    return to_numpy(u.dense()).astype(np.float64)


def near(got: np.ndarray[Any, Any], want: np.ndarray[Any, Any]) -> None:
    """Each product is rounded to fp32 once or twice; sums here have fewer than 64 terms."""
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= 64 * EPS * np.abs(want).max()


def f64(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return x.astype(np.float64)


def test_s2_lora_shared_factors_with_a_diagonal(tmp_path: Path) -> None:
    tensors = {"shared.A": dice(4, 12), "shared.B": dice(10, 4)}
    names = [f"layers.{i}.{p}" for i in (0, 1, 11) for p in ("q_proj", "v_proj")]
    tensors |= {f"{n}.s": dice(4) for n in names}
    adapter = lt.load(written(tmp_path, example("Shared factors with a diagonal"), tensors))
    places = {n: n.replace(".q", ".self_attn.q").replace(".v", ".self_attn.v") for n in names}
    assert sorted(adapter) == sorted(f"model.encoder.{place}.weight" for place in places.values())
    for n in names:
        parameter = f"model.encoder.{places[n]}.weight"
        want = 0.5 * np.einsum(
            "or,r,ri->oi", f64(tensors["shared.B"]), f64(tensors[f"{n}.s"]), f64(tensors["shared.A"])
        )
        near(dense(adapter, parameter), want)
        assert isinstance(adapter[parameter], LowRank)


def test_tera_tucker_network(tmp_path: Path) -> None:
    """dW[(a b), (c d)] = sum G[p q s t] U1[a p] d1[p] U2[b q] d2[q] V1[c s] d3[s] V2[d t] d4[t]."""
    tensors = {"core": dice(2, 3, 2, 2), "U1": dice(4, 2), "U2": dice(6, 3), "V1": dice(3, 2), "V2": dice(5, 2)}
    tensors |= {f"layers.{i}.d{k}": dice(n) for i in range(2) for k, n in ((1, 2), (2, 3), (3, 2), (4, 2))}
    adapter = lt.load(written(tmp_path, example("A Tucker network"), tensors))
    assert len(adapter) == 2
    for i in range(2):
        d = [f64(tensors[f"layers.{i}.d{k}"]) for k in (1, 2, 3, 4)]
        four = np.einsum(
            "pqst,ap,p,bq,q,cs,s,dt,t->abcd", f64(tensors["core"]), f64(tensors["U1"]), d[0], f64(tensors["U2"]), d[1],
            f64(tensors["V1"]), d[2], f64(tensors["V2"]), d[3],
        )  # fmt: skip
        near(dense(adapter, f"model.layers.{i}.mlp.up_proj.weight"), four.reshape(24, 15))


def test_block_lora_with_blocks_along_the_rank(tmp_path: Path) -> None:
    """B = [B_1 ... B_n] and A has n equal blocks of rows: B A = (sum_j B_j) A_0, of rank r / n."""
    tensors = {f"layers.0.B.{j}": dice(9, 2) for j in range(3)} | {"layers.0.A": dice(2, 14)}
    adapter = lt.load(written(tmp_path, example("Factors shared by blocks of the rank"), tensors))
    b = np.concatenate([f64(tensors[f"layers.0.B.{j}"]) for j in range(3)], axis=1)
    a = np.concatenate([f64(tensors["layers.0.A"])] * 3, axis=0)
    name = "model.layers.0.attn.weight"
    near(dense(adapter, name), b @ a)
    assert np.linalg.matrix_rank(dense(adapter, name), tol=1e-4) == 2
    direction = low_rank(adapter[name])
    assert direction is not None
    assert direction.rank == 2


def test_block_lora_with_blocks_along_the_rows(tmp_path: Path) -> None:
    """Heads of rows: head j is B_j A_0."""
    tensors = {f"layers.0.B.{j}": dice(5, 2) for j in range(3)} | {"layers.0.A": dice(2, 14)}
    adapter = lt.load(written(tmp_path, example("Factors shared by blocks of the rows"), tensors))
    want = np.concatenate([f64(tensors[f"layers.0.B.{j}"]) @ f64(tensors["layers.0.A"]) for j in range(3)])
    near(dense(adapter, "model.layers.0.attn.weight"), want)


def haar(n: int) -> np.ndarray[Any, Any]:
    """The synthesis matrix of one Haar level, written out: columns are averages, then differences, of pairs."""
    s = np.zeros((n, n))
    for k in range(n // 2):
        s[2 * k : 2 * k + 2, k] = 2**-0.5
        s[2 * k : 2 * k + 2, n // 2 + k] = [2**-0.5, -(2**-0.5)]
    return s


def test_wara_low_rank_in_the_wavelet_domain(tmp_path: Path) -> None:
    """One pair for every subband: dW = S blockdiag(B A, B A) S^T, of rank 2 r."""
    tensors = {"layers.0.A": dice(2, 6), "layers.0.B": dice(5, 2)}
    adapter = lt.load(written(tmp_path, example("Low rank in the wavelet domain"), tensors))
    c, band = np.zeros((10, 12)), f64(tensors["layers.0.B"]) @ f64(tensors["layers.0.A"])
    c[:5, :6], c[5:, 6:] = band, band
    name = "model.layers.0.attn.weight"
    near(dense(adapter, name), haar(10) @ c @ haar(12).T)
    direction = low_rank(adapter[name])
    assert direction is not None
    assert direction.rank == 4


@pytest.mark.parametrize("family", ["haar", "db2"])
@pytest.mark.parametrize("axes", [["rows"], ["columns"], ["rows", "columns"]])
def test_the_synthesis_is_orthonormal_and_acts_on_the_named_axes(family: str, axes: list[str], tmp_path: Path) -> None:
    tensors = {"c": dice(8, 6)}
    said = f'[[update]]\nname = "w"\ndelta = {{wavelet = "c", family = "{family}", axes = {json.dumps(axes)}}}'
    got = dense(lt.load(written(tmp_path, inline(said), tensors)), "w")
    assert np.isclose(np.linalg.norm(got), np.linalg.norm(f64(tensors["c"])), rtol=1e-6)
    if family == "haar":
        want = f64(tensors["c"])
        want = haar(8) @ want if "rows" in axes else want
        near(got, want @ haar(6).T if "columns" in axes else want)


def test_db2_reproduces_a_constant_from_its_averages(tmp_path: Path) -> None:
    """Scaling functions sum to a constant and two vanishing moments kill lines: x = S (sqrt 2, 0)."""
    said = '[[update]]\nname = "w"\ndelta = {wavelet = "c", family = "db2", axes = ["rows"]}'
    tensors = {"c": np.concatenate([np.full((4, 1), 2**0.5), np.zeros((4, 1))]).astype(np.float32)}
    near(dense(lt.load(written(tmp_path, inline(said), tensors)), "w"), np.ones((8, 1)))


ALGEBRA: dict[str, tuple[str, Any]] = {
    "product": ('{product = ["b", "r", "a"]}', lambda t: t["b"] @ t["r"] @ t["a"]),
    "diagonal first": ('{product = [{diag = "o"}, "b", "a"]}', lambda t: t["o"][:, None] * (t["b"] @ t["a"])),
    "diagonal last": ('{product = ["b", "a", {diag = "i"}]}', lambda t: (t["b"] @ t["a"]) * t["i"]),
    "diagonals meet": (
        '{product = ["b", {diag = "d"}, {diag = "d"}, "a"]}', lambda t: t["b"] @ np.diag(t["d"] ** 2) @ t["a"],
    ),
    "a diagonal alone": ('{diag = "d"}', lambda t: np.diag(t["d"])),
    "kron": ('{kron = ["r", {product = ["b", "a"]}]}', lambda t: np.kron(t["r"], t["b"] @ t["a"])),
    "kron in a product": (
        '{product = [{kron = ["r", "r"]}, "tall"]}', lambda t: np.kron(t["r"], t["r"]) @ t["tall"],
    ),
    "hadamard": (
        '{hadamard = [{product = ["b", "a"]}, {product = ["b2", "a2"]}]}',
        lambda t: (t["b"] @ t["a"]) * (t["b2"] @ t["a2"]),
    ),
    "sum": ('{sum = [{product = ["b", "a"]}, "w"]}', lambda t: t["b"] @ t["a"] + t["w"]),
    "stack": ('{stack = [{product = ["b", "a"]}, "w"]}', lambda t: np.concatenate([t["b"] @ t["a"], t["w"]])),
    "stacked factors": (
        '{stack = [{product = ["b", "a"]}, {product = ["b2", "a2"]}]}',
        lambda t: np.concatenate([t["b"] @ t["a"], t["b2"] @ t["a2"]]),
    ),
    "beside": ('{beside = ["b", "w"]}', lambda t: np.concatenate([t["b"], t["w"]], axis=1)),
    "blocks": ('{blocks = ["r", {product = ["b", "a"]}]}', lambda t: np.block(
        [[t["r"], np.zeros((3, 11))], [np.zeros((9, 3)), t["b"] @ t["a"]]]
    )),
    "blocks of factors": ('{blocks = [{product = ["b", "a"]}, {scaled = {product = ["b2", "a2"]}, by = 2}]}',
                          lambda t: np.block([[t["b"] @ t["a"], np.zeros((9, 11))],
                                              [np.zeros((9, 11)), 2 * (t["b2"] @ t["a2"])]])),
    "transposed": ('{transposed = {product = ["b", "a"]}}', lambda t: (t["b"] @ t["a"]).T),
    "transposed factor": ('{product = ["b", {transposed = "b"}]}', lambda t: t["b"] @ t["b"].T),
    "scaled": ('{scaled = "w", by = -0.25}', lambda t: -0.25 * t["w"]),
    "scaled by a tensor": ('{scaled = {product = ["b", "a"]}, by = "gain"}', lambda t: t["gain"] * (t["b"] @ t["a"])),
    "scaled sum": ('{scaled = {sum = [{product = ["b", "a"]}, {kron = ["row", "col"]}]}, by = 3}',
                   lambda t: 3 * (t["b"] @ t["a"] + np.kron(t["row"], t["col"]))),
    "reshape": ('{reshape = "w", shape = [11, 9]}', lambda t: t["w"].reshape(11, 9)),
    "permute": ('{reshape = {permute = "cube", axes = [1, 0, 2]}, shape = [3, 8]}',
                lambda t: t["cube"].transpose(1, 0, 2).reshape(3, 8)),
    "two chains": ('{product = [{product = ["b", "a"]}, {transposed = {product = ["b2", "a2"]}}]}',
                   lambda t: t["b"] @ t["a"] @ (t["b2"] @ t["a2"]).T),
}  # fmt: skip


def pool() -> Tensors:
    return {
        "b": dice(9, 3), "a": dice(3, 11), "b2": dice(9, 2), "a2": dice(2, 11), "r": dice(3, 3), "d": dice(3),
        "o": dice(9), "i": dice(1, 11), "w": dice(9, 11), "gain": dice(1), "cube": dice(2, 3, 4), "row": dice(1, 11),
        "col": dice(9, 1), "tall": dice(9, 2),
    }  # fmt: skip


@pytest.mark.parametrize("case", ALGEBRA)
def test_every_operation_means_what_it_says(case: str, tmp_path: Path) -> None:
    said, want = ALGEBRA[case]
    tensors = pool()
    if case == "diagonal last":
        tensors["i"] = tensors["i"].reshape(1, 11)
    path = written(tmp_path, inline(f'carry = ["*"]\n[[update]]\nname = "w"\ndelta = {said}'), tensors)
    near(dense(lt.load(path), "w"), want({k: f64(v) for k, v in tensors.items()}))


REFUSED = {
    "an unknown operation": '[[update]]\nname = "w"\ndelta = {einsum = ["b", "a"]}',
    "two operations": '[[update]]\nname = "w"\ndelta = {product = ["b", "a"], sum = ["b"]}',
    "an unknown option": '[[update]]\nname = "w"\ndelta = {diag = "d", by = 2}',
    "an unknown tensor": '[[update]]\nname = "w"\ndelta = {product = ["B", "a"]}',
    "a vector as a matrix": '[[update]]\nname = "w"\ndelta = {product = ["b", "d"]}',
    "factors that do not multiply": '[[update]]\nname = "w"\ndelta = {product = ["a", "b2"]}',
    "an unknown word": '[[update]]\nname = "w"\ndelta = "b"\nalpha = 2',
    "an unknown word at the top": 'rank = 2\n[[update]]\nname = "w"\ndelta = "b"',
    "no update": "",
    "both delta and replace": '[[update]]\nname = "w"\ndelta = "b"\nreplace = "b"',
    "an unknown wavelet": '[[update]]\nname = "w"\ndelta = {wavelet = "tall", family = "sym9"}',
    "an odd axis under a wavelet": '[[update]]\nname = "w"\ndelta = {wavelet = "w", axes = ["rows"]}',
    "a placeholder without numbers": '[[update]]\nname = "{i}.w"\ndelta = "b"',
    "a wrong shape": '[[update]]\nname = "w"\ndelta = "b"\nshape = [3, 9]',
    "an unequal sum": '[[update]]\nname = "w"\ndelta = {sum = ["b", "a"]}',
    "a misfit in a network": '[[update]]\nname = "w"\ndelta = {tucker = "cube", left = ["b2", "b"], right = ["b"]}',
    "an expression in place of a list": '[[update]]\nname = "w"\ndelta = {product = "b"}',
    "settings that are no table": 'settings = 3\n[[update]]\nname = "w"\ndelta = "b"',
    "a base that is no name": 'base = 3\n[[update]]\nname = "w"\ndelta = "b"',
    "a shape that is none": '[[update]]\nname = "w"\ndelta = "b"\nshape = "large"',
    "a shape that is a number": '[[update]]\nname = "w"\ndelta = "b"\nshape = 3',
    "a scale that is none": '[[update]]\nname = "w"\ndelta = "b"\nscale = {}',
    "a placeholder that is none": '[[update]]\nname = "{1}.w"\ndelta = "{1}.b"',
    "an update that is none": "update = 3",
    "tensors left over": '[[update]]\nname = "w"\ndelta = "b"',
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_nobody_reads_is_refused(case: str, tmp_path: Path) -> None:
    carry = "" if case in ("tensors left over", "an unknown word at the top") else 'carry = ["*"]\n'
    path = written(tmp_path, inline(carry + REFUSED[case]), pool())
    with pytest.raises(FormatError):
        lt.load(path)


def test_unknown_versions_files_outside_and_damaged_text_are_refused(tmp_path: Path) -> None:
    good = written(tmp_path, inline('[[update]]\nname = "w"\ndelta = "b"'), {"b": dice(2, 2)})
    for old, new in (("manifest = 1", "manifest = 2"), ('"weights.s', '"../weights.s'), ("[[update]]", "[[update]")):
        bad = tmp_path / "bad.toml"
        bad.write_text(good.read_text().replace(old, new))
        with pytest.raises(FormatError):
            lt.load(bad)


def test_a_mixture_is_no_adapter_by_itself(tmp_path: Path) -> None:
    said = '[[update]]\nname = "w"\nexperts = "e"\ndelta = {product = ["B.{e}", "A.{e}"]}'
    path = written(tmp_path, inline(said), {f"{f}.{e}": dice(3, 3) for f in "AB" for e in range(2)})
    with pytest.raises(UnsupportedError, match="collapse"):
        lt.load(path)


def test_replacements_and_carried_tensors(tmp_path: Path) -> None:
    said = 'carry = ["step*"]\n[[update]]\nname = "head.weight"\nreplace = "new_head"'
    adapter = lt.load(written(tmp_path, inline(said), {"new_head": dice(3, 4), "step_count": dice(1)}))
    assert adapter["head.weight"].kind == "replace"
    assert list(adapter.meta.leftover) == ["step_count"]


def test_a_base_turns_what_it_stores_the_other_way(tmp_path: Path) -> None:
    said = '[[update]]\nname = "w"\ndelta = {sum = [{product = ["b", "a"]}, "d"]}'
    tensors = {"b": dice(6, 2), "a": dice(2, 9), "d": dice(6, 9)}
    path = written(tmp_path, inline(said), tensors)
    turned = lt.load(path, base={"w": dice(9, 6)})
    near(dense(turned, "w"), (f64(tensors["b"]) @ f64(tensors["a"]) + f64(tensors["d"])).T)
    with pytest.raises(MismatchError):
        lt.load(path, base={"w": dice(9, 7)})


def test_written_back_unchanged_with_its_manifest_and_native_once_changed(tmp_path: Path) -> None:
    said = '[[update]]\nname = "w"\ndelta = {product = ["b", {diag = "s"}, "a"]}'
    adapter = lt.load(written(tmp_path, inline(said), {"b": dice(8, 3), "s": dice(3), "a": dice(3, 9)}))
    again = lt.load(save(adapter, tmp_path / "same.safetensors"))
    assert again.meta.format == "manifest"
    assert np.array_equal(dense(again, "w"), dense(adapter, "w"))
    small = lt.squeeze(adapter, rank=1)
    back = lt.load(save(small, tmp_path / "small.safetensors"))
    assert back.meta.format == "native"
    assert back.meta.config["manifest"] == adapter.meta.config["manifest"]
    left, s, right = np.linalg.svd(dense(adapter, "w"))
    near(dense(back, "w"), s[0] * np.outer(left[:, 0], right[0]))
    digits = lt.load(Path(__file__).parents[2] / "fixtures" / "digits" / "r4")
    with pytest.raises(ConversionError, match="not written"):
        save(digits, tmp_path / "x.safetensors", format="manifest")
