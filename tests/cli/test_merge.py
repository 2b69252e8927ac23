from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from loratools.io.base import Base


def test_merge_and_unmerge(run: Callable[..., Any], digits: Path, tmp_path: Path) -> None:
    base, one, two = digits / "base", digits / "r4", digits / "r4-dora"
    done = run("merge", base, one, two, "--weights", "0.5,0.5", "-o", tmp_path / "m", "--undo", tmp_path / "u")
    assert done.code == 0
    assert f"wrote {tmp_path / 'm'}" in done.out
    assert Base.open(tmp_path / "m").identity == Base.open(base).identity
    back = run("unmerge", tmp_path / "m", one, two, "--undo", tmp_path / "u", "-o", tmp_path / "b", "--json")
    assert back.code == 0
    said = json.loads(back.out)
    assert said["schema"] == "loratools.unmerge/1"
    assert [row["path"] for row in said["inputs"]][-1] == str(tmp_path / "m")
    assert any("not exact" in line for line in said["warnings"])
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_merge_says_what_rounding_lost(run: Callable[..., Any], digits: Path, tmp_path: Path) -> None:
    done = run("merge", digits / "base", digits / "r4", "-o", tmp_path / "m", "--json")
    said = json.loads(done.out)
    assert said["schema"] == "loratools.merge/1"
    assert {"update_norm", "relative_norm", "rounding_loss"} <= said["modules"][0].keys()
    assert 0 < said["total"]["rounding_loss"] < 0.01
    assert said["inputs"][0]["sha256"]
    assert said["inputs"][1]["identity"] == Base.open(digits / "base").identity


def test_a_gate_that_fails_leaves_nothing(run: Callable[..., Any], digits: Path, tmp_path: Path) -> None:
    done = run("merge", digits / "base", digits / "r4", "-o", tmp_path / "m", "--fail-on", "rounding_loss>1e-9")
    assert done.code == 1
    assert "nothing written" in done.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--weights", "1,2"], "one number per IN"),
        (["--weights", "x"], "does not parse"),
        (["--fail-on", "x"], "does not parse"),
    ],
)
def test_wrong_options(words: list[str], told: str, run: Callable[..., Any], digits: Path, tmp_path: Path) -> None:
    done = run("merge", digits / "base", digits / "r4", "-o", tmp_path / "m", *words)
    assert (done.code, done.out) == (2, "")
    assert told in done.err


def test_a_gpu_that_is_not_there_is_an_error_before_any_work(
    run: Callable[..., Any], digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = run("merge", digits / "base", digits / "r4", "-o", tmp_path / "m", "--device", "cuda")
    assert (done.code, done.out) == (2, "")
    assert "torch sees no CUDA device" in done.err
    assert not list(tmp_path.iterdir())
    assert run("merge", digits / "base", digits / "r4", "-o", tmp_path / "m", "--device", "auto").code == 0


def test_quantised_and_gguf_bases(run: Callable[..., Any], digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "x-bnb-4bit"
    folder.mkdir()
    save_file(
        {"q.weight": np.zeros((2, 4), np.uint8), "q.weight.absmax": np.ones(1, np.float32)},
        folder / "model.safetensors",
    )
    (tmp_path / "x.gguf").write_bytes(b"GGUF\0\0\0\0")
    for path, told in ((folder, "bitsandbytes"), (tmp_path / "x.gguf", "GGUF")):
        done = run("merge", path, digits / "r4", "-o", tmp_path / "m")
        assert done.code == 2
        assert told in done.err


def test_extract_then_merge_comes_near_the_tuned_model(run: Callable[..., Any], digits: Path, tmp_path: Path) -> None:
    done = run("extract", digits / "base", digits / "tuned", "--rank", "256", "-o", tmp_path / "lora", "--json")
    said = json.loads(done.out)
    assert said["schema"] == "loratools.extract/1"
    assert [row["path"] for row in said["inputs"]] == [str(digits / "base"), str(digits / "tuned")]
    assert said["total"]["relative_error"] < 2e-3  # the rounding of the fp16 factors
    assert run("merge", digits / "base", tmp_path / "lora", "-o", tmp_path / "m").code == 0
    found, tuned = Base.open(tmp_path / "m"), Base.open(digits / "tuned")
    for name in tuned:
        x, y = found[name].astype(np.float64), tuned[name].astype(np.float64)
        # fp16 factors (2^-11 of the update each) and one rounding of the sum
        assert np.linalg.norm(x - y) <= 4 * 2.0**-11 * np.linalg.norm(y), name


def test_extract_refuses_before_any_work(run: Callable[..., Any], digits: Path, tmp_path: Path) -> None:
    base, tuned = digits / "base", digits / "tuned"
    assert "exactly one target" in run("extract", base, tuned).err
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("")
    assert run("extract", base, tuned, "--rank", "2", "-o", tmp_path / "taken").code == 2
    assert run("extract", base, tuned, "--rank", "2", "-o", tmp_path / "o", "--fail-on", "relative_error>0.1").code == 1
    assert not (tmp_path / "o").exists()


def test_recover(run: Callable[..., Any], adapter: Callable[..., Path], tmp_path: Path) -> None:
    plain = adapter()
    initial = plain.rename(tmp_path / "initial")
    raw = adapter(init_lora_weights="pissa", tensors={"base_model.model.q.lora_A.weight": np.ones((4, 6), np.float32)})
    done = run("recover", raw, "--initial", initial, "-o", tmp_path / "plain")
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert config["r"] == 6  # of rank 8, at most the smaller side
    assert "--initial" in run("recover", raw).err
    squeezed = run("recover", raw, "--initial", initial, "--rank", "2", "-o", tmp_path / "small")
    assert squeezed.code == 0
    assert json.loads((tmp_path / "small" / "adapter_config.json").read_text())["r"] == 2
    assert run("merge", tmp_path, raw).code == 2


def test_recover_by_an_index(run: Callable[..., Any], adapter: Callable[..., Path], tmp_path: Path) -> None:
    index = tmp_path / "kept.json"
    index.write_text(
        json.dumps({"parameters": {"q.weight": {"shape": [10, 6], "kept_rows": [0, 1, 2, 3, 5, 6, 7, 9]}}})
    )
    done = run("recover", adapter(), "--index", index, "-o", tmp_path / "full", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["modules"][0]["shape_after"] == [10, 6]
