"""stats as a user meets it, and its file in the commands that take it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

pytest.importorskip("torch", reason="needs the extra calibrate")
pytest.importorskip("transformers", reason="needs the extra calibrate")


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    held = {"pixel_values": rng.standard_normal((6, 1, 8, 8)).astype("f4"), "labels": np.arange(6) % 10}
    save_file(held, tmp_path / "inputs.safetensors")
    return tmp_path / "inputs.safetensors"


def test_from_a_model_to_a_weighted_squeeze(
    run: Callable[..., Any], digits: Path, inputs: Path, tmp_path: Path
) -> None:
    stats = tmp_path / "stats.safetensors"
    more = ["--adapter", digits / "r4", "--gradients", "--batch", "4", "--json"]
    code, out, err = run("stats", digits / "base", "--inputs", inputs, "-o", stats, *more)
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert said["schema"] == "loratools.stats/1"
    assert said["output"]["path"] == str(stats)
    assert said["inputs"][0]["identity"]
    assert len(said["modules"]) == said["total"]["modules"] == 16
    held = load_file(stats)
    assert held.keys() == {f"{row['name']}.{key}" for row in said["modules"] for key in ("in_diag", "out_diag")}
    done = run("squeeze", digits / "r4", "--rank", "1", "--stats", stats, "--json", "--dry-run")
    assert done.code == 0
    report = json.loads(done.out)
    assert report["warnings"] == []
    plain = json.loads(run("squeeze", digits / "r4", "--rank", "1", "--json", "--dry-run").out)
    assert report["total"]["relative_error"] > plain["total"]["relative_error"]
    assert 0 < report["total"]["weighted_error"] < 1
    both = run(
        "fuse", digits / "r4", digits / "r1", "--method", "regmean", "--stats", stats, "--stats", stats, "--dry-run"
    )
    assert both.code == 0
    assert run("stats", digits / "base", "--inputs", inputs, "-o", stats).code == 2  # it exists
    gram = run(
        "stats", digits / "base", "--inputs", inputs, "--gram", "--fail-on", "peak>1", "-o", tmp_path / "g.safetensors"
    )
    assert gram.code == 1
    assert not (tmp_path / "g.safetensors").exists()


def test_wrong_usage(run: Callable[..., Any], digits: Path, inputs: Path, tmp_path: Path) -> None:
    base = digits / "base"
    words = tmp_path / "words.txt"
    words.write_text("a line\n")
    uneven = tmp_path / "uneven.safetensors"
    save_file({"pixel_values": np.zeros((6, 1, 8, 8), np.float32), "labels": np.zeros(5, np.int64)}, uneven)
    strange = tmp_path / "strange.safetensors"
    save_file({"pixels": np.zeros((6, 1, 8, 8), np.float32)}, strange)
    out = ["-o", tmp_path / "out.safetensors"]
    for args, said in (
        ([base, *out], "one of them"),
        ([base, "--inputs", inputs, "--text", words, *out], "one of them"),
        ([digits / "base" / "model.safetensors", "--inputs", inputs, *out], "directory of a model"),
        ([base, "--inputs", tmp_path / "nowhere", *out], "no such file"),
        ([base, "--inputs", words, *out], str(words)),
        ([base, "--inputs", uneven, *out], "number of samples"),
        ([base, "--text", words, *out], "no tokenizer"),
        ([base, "--inputs", strange, *out], "cannot run on these inputs"),
    ):
        done = run("stats", *args)
        assert done.code == 2, args
        assert said in done.err, args
    assert not (tmp_path / "out.safetensors").exists()
