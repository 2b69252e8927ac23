"""Sparse adapters from the shell: made, compared, fused, put on and taken off; and every mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import loratools as lt
from loratools.kinds.sparse import Sparse

Run = Callable[..., Any]


@pytest.fixture
def pair(run: Run, digits: Path, tmp_path: Path) -> list[Path]:
    """Two native sparse adapters of one model."""
    paths = [tmp_path / f"{name}.safetensors" for name in ("56", "78")]
    for path in paths:
        source = digits / f"group-{path.stem}"
        assert run("shira", source, "--density", "0.02", "--to", "native", "-o", path).code == 0
    return paths


def test_union_from_the_shell(run: Run, pair: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "fused.safetensors"
    code, told, err = run("fuse", *pair, "--method", "union", "-o", out)
    assert (code, err) == (0, "")
    assert "entries" in told
    one, two, done = lt.load(pair[0]), lt.load(pair[1]), lt.load(out)
    name = next(iter(done))
    assert isinstance(done[name], Sparse)
    x, y = one[name].dense(), two[name].dense()  # type: ignore[attr-defined]
    total = x + y
    want = np.where(x * total > 0, x, 0) + np.where(y * total > 0, y, 0)
    # stored in the inputs' 16 bits: half an ulp of bfloat16
    assert np.abs(done[name].dense() - want).max() <= 2**-8 * np.abs(want).max()  # type: ignore[attr-defined]
    assert set(np.flatnonzero(done[name].dense())) <= set(np.flatnonzero(x)) | set(np.flatnonzero(y))  # type: ignore[attr-defined]


def test_the_plain_sum_stays_sparse(run: Run, pair: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "fused.safetensors"
    code, told, _ = run("fuse", *pair, "--weights", "1,-0.5", "--dtype", "float32", "-o", out, "--json")
    assert code == 0
    total = json.loads(told)["total"]
    assert max(lt.load(p).nbytes for p in pair) < lt.load(out).nbytes
    assert total["entries_after"] <= total["entries_before"]
    one, two, done = lt.load(pair[0]), lt.load(pair[1]), lt.load(out)
    for name, u in done.items():
        want = one[name].dense() - 0.5 * two[name].dense()  # type: ignore[attr-defined]
        assert np.abs(u.dense() - want).max() <= 2**-23 * np.abs(want).max()  # type: ignore[attr-defined]


def test_a_fused_adapter_does_not_speak_of_its_inputs_base(run: Run, digits: Path, tmp_path: Path) -> None:
    """The hash of the base's values is that of other entries: the fused adapter is put on all the same."""
    base, paths = digits / "base", [tmp_path / f"{name}.safetensors" for name in ("a", "b")]
    for path, group in zip(paths, ("56", "78"), strict=True):
        source = digits / f"group-{group}"
        assert run("shira", source, "--density", "0.02", "--base", base, "--to", "native", "-o", path).code == 0
    out, model = tmp_path / "fused.safetensors", tmp_path / "model"
    assert run("fuse", *paths, "--method", "union", "-o", out).code == 0
    model.mkdir()
    (model / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    assert run("switch", model, "--on", out).code == 0
    assert run("switch", model, "--off", out).code == 0
    assert (model / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_a_rank_makes_factors_of_sparse_adapters(run: Run, pair: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "fused.safetensors"
    assert run("fuse", *pair, "--rank", "4", "-o", out).code == 0
    assert {u.kind for u in lt.load(out).values()} == {"lowrank"}


def test_compare_tells_the_papers_figures(run: Run, pair: list[Path]) -> None:
    code, told, _ = run("compare", *pair)
    assert code == 0
    assert "AWOM" in told
    said = json.loads(run("compare", *pair, "--json").out)
    (row,) = said["modules"]
    separate = lt.sparse_interference([lt.load(p) for p in pair])
    assert row["awom"] == pytest.approx(separate.total["awom"])
    assert row["awor"] == pytest.approx(separate.total["awor"])
    assert 0 <= row["overlap"] <= 1
    assert run("compare", *pair, "--fail-on", "awor<1.5").code == 1


def test_compare_of_factors_has_no_sparse_figures(run: Run, digits: Path) -> None:
    said = json.loads(run("compare", digits / "group-56", digits / "group-78", "--json").out)
    assert "awom" not in said["modules"][0]


@pytest.mark.parametrize("density", ["0", "-0.1", "1.5", "nan", "inf", "much"])
def test_impossible_densities_are_refused(run: Run, digits: Path, tmp_path: Path, density: str) -> None:
    code, _, err = run("shira", digits / "group-56", "--density", density, "-o", tmp_path / "out")
    assert code == 2
    assert "density" in err
    assert not (tmp_path / "out").exists()


def test_density_one_is_the_whole_update(run: Run, digits: Path, tmp_path: Path) -> None:
    source, out = digits / "group-56", tmp_path / "all.safetensors"
    assert run("shira", source, "--density", "1", "--to", "native", "--dtype", "float32", "-o", out).code == 0
    done, before = lt.load(out), lt.load(source)
    name = next(iter(done))
    assert np.allclose(done[name].dense(), before[name].dense(), rtol=1e-5, atol=1e-9)  # type: ignore[attr-defined]


def test_a_dry_run_asks_the_writer(run: Run, adapter: Callable[..., Path], tmp_path: Path) -> None:
    """A carried bias has no place in PEFT's SHiRA layout: the dry run says so as the run does."""
    source = adapter({"base_model.model.q.base_layer.bias": np.ones(8, np.float32)}, bias="all")
    words = ("shira", source, "--density", "0.9", "-o", tmp_path / "out")
    real = run(*words)
    dry = run(*words, "--dry-run")
    assert real.code == 2
    assert "no place in a PEFT SHiRA file" in real.err
    assert (dry.code, dry.err) == (real.code, real.err)


def test_a_dry_run_of_extract_asks_the_writer(run: Run, digits: Path, tmp_path: Path) -> None:
    """Changed biases and norms of the fine-tune have no place in PEFT's SHiRA layout."""
    words = ("extract", digits / "base", digits / "tuned", "--sparse", "--density", "0.05", "-o", tmp_path / "out")
    real = run(*words)
    dry = run(*words, "--dry-run")
    assert real.code == 2
    assert (dry.code, dry.err) == (real.code, real.err)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_of_a_union_asks_the_writer(run: Run, digits: Path, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("56", "78")]
    for path in paths:
        assert run("shira", digits / f"group-{path.name}", "--density", "0.05", "-o", path).code == 0
    words = ("fuse", *paths, "--method", "union", "-o", tmp_path / "out")
    assert "--to native" in run(*words, "--dry-run").err
    assert run(*words).code == 2
    assert run(*words, "--to", "native", "--dry-run").code == 0


def test_a_native_file_lies_beside_other_weights(run: Run, digits: Path, tmp_path: Path) -> None:
    """It needs no config, so it speaks for no other file, whatever its inputs were."""
    path = tmp_path / "56"
    assert run("shira", digits / "group-56", "--density", "0.05", "-o", path).code == 0
    (tmp_path / "other.safetensors").write_bytes((path / "adapter_model.safetensors").read_bytes())
    words = ("fuse", path, path, "--method", "union", "--to", "native", "-o", tmp_path / "out.safetensors")
    assert run(*words).code == 0
    assert not (tmp_path / "adapter_config.json").exists()


def test_quantize_advise_takes_no_other_task(run: Run, digits: Path, tmp_path: Path) -> None:
    source = digits / "group-56"
    for more in (("--bits", "1"), ("--avg-bits", "2"), ("--size", "1MB"), ("-o", tmp_path / "x"), ("--raw",),
                 ("--scheme", "binary-adapter"), ("--dry-run",), ("--stats", "norm"), ("--overwrite",)):  # fmt: skip
        code, _, err = run("quantize", source, "--advise", *more)
        assert code == 2, more
        assert "--advise" in err
    assert run("quantize", source, "--advise").code == 0


def test_quantize_advise_is_gated(run: Run, digits: Path) -> None:
    code, _, err = run("quantize", digits / "group-56", "--advise", "--fail-on", "relative_error>0")
    assert code == 1
    assert "gate failed" in err


def test_a_wrong_base_is_refused(run: Run, digits: Path, tmp_path: Path) -> None:
    path, model = tmp_path / "s.safetensors", tmp_path / "model"
    words = ("shira", digits / "group-56", "--density", "0.02", "--base", digits / "base", "--to", "native", "-o", path)
    assert run(*words).code == 0
    held = {n: np.zeros_like(w) for n, w in lt_base(digits / "base").items()}
    model.mkdir()
    save_file(held, model / "model.safetensors")
    before = (model / "model.safetensors").read_bytes()
    code, _, err = run("switch", model, "--on", path)
    assert code == 2
    assert "not the model" in err
    assert (model / "model.safetensors").read_bytes() == before
    assert [p.name for p in model.iterdir()] == ["model.safetensors"]


def lt_base(path: Path) -> dict[str, np.ndarray]:
    from loratools.io.base import Base

    return dict(Base.open(path).items())
