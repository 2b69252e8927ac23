"""`loratools fuse` as a user types it: results, reports, and every mistake before any work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratools as lt
from loratools.fusion.base import FUSIONS

Run = Callable[..., Any]


@pytest.fixture
def groups(digits: Path) -> list[Path]:
    return [digits / f"group-{name}" for name in ("56", "78", "90")]


def test_three_into_one(run: Run, groups: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "fused"
    code, told, _ = run("fuse", *groups, "--weights", "0.5,0.5,0.25", "--rank", "6", "-o", out)
    assert code == 0
    assert told.splitlines()[-1] == f"wrote {out}"
    done, parts = lt.load(out), [lt.load(p) for p in groups]
    name = next(iter(done))
    total = sum(w * p[name].dense() for w, p in zip((0.5, 0.5, 0.25), parts, strict=True))  # type: ignore[attr-defined]
    best = np.linalg.norm(np.linalg.svd(total)[1][6:])
    # the optimum, and rounding of the factors to 16 bits (2^-8 at worst)
    assert np.linalg.norm(done[name].dense() - total) <= best + 2**-8 * np.linalg.norm(total)  # type: ignore[attr-defined]
    assert "fuse linear --rank 6 of group-56 (0.5), group-78 (0.5), group-90 (0.25)" in (out / "README.md").read_text()
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (6, 6, False)


def test_the_report_as_json(run: Run, groups: list[Path]) -> None:
    code, told, err = run("fuse", *groups, "--method", "ties", "--set", "density=0.5", "--dry-run", "--json")
    assert (code, err) == (0, "")
    said = json.loads(told)
    assert said["schema"] == "loratools.fuse/1"
    assert said["method"] == "ties density=0.5 sign=total scale=1.0"
    assert [pair["a"] for pair in said["pairs"]] == ["group-56", "group-56", "group-78"]
    assert {"norms", "kept", "covered", "interference", "rank_after", "relative_error"} <= said["modules"][0].keys()
    assert said["output"] is None


def test_the_list_of_methods_is_complete(run: Run) -> None:
    code, told, _ = run("fuse", "--list")
    assert code == 0
    for name, method in FUSIONS.items():
        assert f"{name}: {method.summary}" in told
        assert method.guarantee in told
        assert method.reference in told
        assert all(f"--set {p}=" in told for p in method.parameters)
    said = json.loads(run("fuse", "--list", "--json").out)
    assert [m["name"] for m in said["methods"]] == list(FUSIONS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "tie"], "did you mean 'ties'?"),
        (["--method", "ties", "--set", "densty=0.2"], "did you mean 'density'?"),
        (["--method", "ties", "--set", "density=2"], "wrong value of density"),
        (["--method", "ties", "--set", "density"], "--set does not parse"),
        (["--method", "ties", "--set", "density=0.2", "--set", "density=0.3"], "given twice"),
        (["--weights", "1"], "--weights needs one number per IN"),
        (["--weights", "1,a,2"], "--weights does not parse"),
        (["--rank", "3", "--energy", "0.9"], "two targets"),
        (["--rank", "many"], "no such rank"),
        (["--energy", "1.5"], "energy is a share"),
        (["--take", "gruop-56"], "did you mean 'group-56'?"),
        (["--method", "slerp"], "wrong number of adapters"),
        (["--method", "regmean"], "needs statistics"),
        (["--fail-on", "kept>1, lost<2"], "no figure named 'lost'"),
    ],
)
def test_mistakes_are_one_message(run: Run, groups: list[Path], tmp_path: Path, words: list[str], message: str) -> None:
    code, told, err = run("fuse", *groups, *words, "-o", tmp_path / "out")
    assert (code, told) == (2, "")
    assert message in err
    assert not (tmp_path / "out").exists()


def test_a_wrong_method_is_told_before_a_file_is_opened(run: Run, tmp_path: Path) -> None:
    assert "did you mean 'ties'?" in run("fuse", tmp_path / "nothing", "--method", "tie").err


def test_the_output_is_checked_before_the_work(run: Run, groups: list[Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    code, _, err = run("fuse", *groups, "-o", tmp_path / "out")
    assert code == 2
    assert "exists" in err
    code, _, err = run("fuse", *groups, "-o", groups[1], "--overwrite")
    assert code == 2
    assert "the output directory holds the input" in err


def test_a_gate_writes_nothing(run: Run, groups: list[Path], tmp_path: Path) -> None:
    code, _, err = run("fuse", *groups, "--rank", "2", "--fail-on", "relative_error>0.01", "-o", tmp_path / "out")
    assert code == 1
    assert "gate failed" in err
    assert not (tmp_path / "out").exists()


def test_dora_needs_its_base_and_then_tells_of_the_cut(run: Run, digits: Path, tmp_path: Path) -> None:
    words = ["fuse", digits / "r4-dora", digits / "group-56"]
    assert "pass --base BASE" in run(*words).err
    code, _, err = run(*words, "--base", digits / "base", "--rank", "16", "-o", tmp_path / "out")
    assert code == 0
    assert "no exact low rank" in err
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["use_dora"] is False


def test_full_rank_results_are_whole_in_a_native_file(run: Run, groups: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    code, _, _ = run("fuse", *groups, "--method", "ties", "--rank", "full", "--to", "native", "-o", out)
    assert code == 0
    assert {u.kind for u in lt.load(out).values()} == {"dense"}
    refused = run("fuse", *groups, "--method", "ties", "--rank", "full", "-o", tmp_path / "peft")
    assert refused.code == 2
    assert "the native format holds every kind" in refused.err
