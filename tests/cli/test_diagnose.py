"""diagnose and tame as a user meets them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loratools as lt


@pytest.fixture
def base(digits: Path) -> list[Any]:
    return ["--base", digits / "base"]


def test_words_table_and_total(run: Callable[..., Any], digits: Path, base: list[Any]) -> None:
    code, out, err = run("diagnose", digits / "r4", *base)
    assert (code, err) == (0, "")
    assert "16 updated matrices of rank 4" in out
    assert "intruder dimensions (eps 0.5) among 160" in out
    assert out.rstrip().splitlines()[-1].startswith("total")


def test_gates_fail_with_1_and_say_where(
    run: Callable[..., Any], digits: Path, base: list[Any], tmp_path: Path
) -> None:
    log = tmp_path / "log.sarif"
    expr = "intruders>3, nonfinite>0, relative_norm>0.9, total.effective_rank<2"
    code, out, err = run("diagnose", digits / "r4", *base, "--fail-on", expr, "--sarif", log, "--json")
    assert code == 1
    body = json.loads(out)
    assert [check["ok"] for check in body["checks"]] == [False, True, True, True]
    assert body["checks"][0]["module"].endswith("v_proj.weight")
    assert err == ""
    results = json.loads(log.read_text())["runs"][0]["results"]
    assert len(results) == sum(row["intruders"] > 3 for row in body["modules"])
    assert run("diagnose", digits / "r4", "--fail-on", "nonfinite>0")[0] == 0


def test_github_annotations(run: Callable[..., Any], digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    code, out, err = run("diagnose", digits / "r4", "--fail-on", "total.stable_rank<3", "--json")
    assert code == 1
    assert json.loads(out)
    assert err.startswith("::error file=")


def test_page_and_pictures(run: Callable[..., Any], digits: Path, base: list[Any], tmp_path: Path) -> None:
    page, folder = tmp_path / "page.html", tmp_path / "pictures"
    args = ("diagnose", digits / "r1", digits / "r4", *base, "--html", page, "--plots", folder, "-q")
    assert run(*args) == (0, "", "")
    assert "<title>r4</title>" in page.read_text()
    assert (folder / "history.png").exists()
    code, _, err = run(*args)
    assert code == 2
    assert "exists already" in err
    assert run(*args, "--overwrite").code == 0


def test_whole_model(run: Callable[..., Any], digits: Path, base: list[Any]) -> None:
    code, out, _ = run("diagnose", digits / "tuned", "--whole-model", *base, "--json")
    assert code == 0
    assert json.loads(out)["total"]["modules"] > 16
    assert run("diagnose", digits / "tuned", "--whole-model").code == 2


def test_both_sides_and_curve_and_cache(run: Callable[..., Any], digits: Path, base: list[Any], tmp_path: Path) -> None:
    extra = ("--both-sides", "--rank-curve", "--cache", tmp_path / "cache", "--top", "5", "--eps", "0.4")
    code, out, _ = run("diagnose", digits / "r4", *base, *extra, "--json")
    assert code == 0
    row = json.loads(out)["modules"][0]
    assert len(row["max_cosine_upper_right"]) == len(row["max_cosine_upper"]) == 5
    assert len(row["prefix_error"]) == 4
    assert len(list((tmp_path / "cache").iterdir())) == 16


@pytest.mark.parametrize(
    ("expr", "words"),
    [
        ("intruders>>3", "character 1"),
        ("nonfinite>0, intruders>x", "character 13"),
        ("nonfinite>0, beauty>1", "no figure named 'beauty', at character 14"),
        ("", "character 1"),
    ],
)
def test_expressions_that_do_not_parse(run: Callable[..., Any], digits: Path, expr: str, words: str) -> None:
    code, out, err = run("diagnose", digits / "r4", "--fail-on", expr)
    assert (code, out) == (2, "")
    assert words in err
    assert "effective_rank" in err  # the allowed names


def test_gates_that_need_a_base(run: Callable[..., Any], digits: Path) -> None:
    code, _, err = run("diagnose", digits / "r4", "--fail-on", "intruders>0")
    assert code == 2
    assert "--base" in err


def test_wrong_and_quantised_bases(run: Callable[..., Any], digits: Path, tmp_path: Path) -> None:
    save_file({"other.weight": np.ones((3, 3), np.float32)}, tmp_path / "model.safetensors")
    code, _, err = run("diagnose", digits / "r4", "--base", tmp_path)
    assert code == 2
    assert "16 of 16 parameters" in err
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "awq"}}))
    weights = load_file(digits / "base" / "model.safetensors")
    save_file(weights, tmp_path / "model.safetensors")
    for command in ("diagnose", "tame"):
        code, _, err = run(command, digits / "r4", "--base", tmp_path)
        assert code == 2
        assert "AWQ" in err


def test_base_with_values_that_are_not_finite(run: Callable[..., Any], digits: Path, tmp_path: Path) -> None:
    weights = load_file(digits / "base" / "model.safetensors")
    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    weights[name] = np.where(np.arange(weights[name].shape[1]) == 3, np.inf, weights[name]).astype(weights[name].dtype)
    save_file(weights, tmp_path / "model.safetensors")
    code, _, err = run("diagnose", digits / "r4", "--base", tmp_path)
    assert code == 2
    assert "not finite" in err
    assert name in err


def test_tame_writes_an_adapter_with_fewer_intruders(
    run: Callable[..., Any], digits: Path, base: list[Any], tmp_path: Path
) -> None:
    out = tmp_path / "tamed"
    code, said, _ = run("tame", digits / "r4", *base, "--lambda", "0", "--all", "-o", out, "--json")
    assert code == 0
    report = json.loads(said)
    assert report["schema"] == "loratools.tame/1"
    assert report["total"]["tamed"] == report["total"]["intruders"] > 16
    assert lt.diagnose(lt.load(out), base=digits / "base").total["intruders"] < 3
    assert run("tame", digits / "r4", *base, "-o", out).code == 2
    assert run("tame", digits / "r4", *base, "--dry-run", "-o", tmp_path / "none").code == 0
    assert not (tmp_path / "none").exists()


def test_tame_needs_a_base_and_a_factor_in_range(run: Callable[..., Any], digits: Path, base: list[Any]) -> None:
    assert run("tame", digits / "r4").code == 2
    code, _, err = run("tame", digits / "r4", *base, "--lambda", "1.5")
    assert code == 2
    assert "lambda" in err


def test_the_rank_curve_is_printed(run: Callable[..., Any], digits: Path) -> None:
    done = run("diagnose", digits / "r4", "--rank-curve")
    assert done.code == 0
    lines = done.out.splitlines()
    start = lines.index("relative error of the whole adapter at every rank")
    assert [line.split()[0] for line in lines[start + 2 : start + 6]] == ["1", "2", "3", "4"]
    assert lines[start + 6].startswith("AURAC over the ranks")
    assert lines[start + 7].startswith("AURAC over their logarithm")
    said = json.loads(run("diagnose", digits / "r32", "--rank-curve", "--json").out)
    curve = said["rank_curve"]
    assert curve["ranks"] == list(range(1, 33))
    assert all(o <= p + 1e-6 for o, p in zip(curve["optimal_error"], curve["prefix_error"], strict=True))
    assert "rank_curve" not in json.loads(run("diagnose", digits / "r4", "--json").out)
