"""convert --type and adapters of an altered base, on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import loratools as lt
from loratools.io.base import Base
from loratools.kinds.dora import Dora
from loratools.kinds.lowrank import LowRank

DIGITS = Path(__file__).parents[2] / "fixtures" / "digits"
BASE = DIGITS / "base"


def test_dora_to_lora_tells_its_error(run: Callable[..., Any], tmp_path: Path) -> None:
    words = ["--to", "peft", "--type", "lora", "--base", BASE, "--rank", "16", "-o", tmp_path / "lora", "--json"]
    done = run("convert", DIGITS / "r4-dora", *words)
    assert done.code == 0
    said = json.loads(done.out)
    written, dora, weights = lt.load(tmp_path / "lora"), lt.load(DIGITS / "r4-dora"), Base.open(BASE)
    for row in said["modules"]:
        u = written[row["name"]]
        assert isinstance(u, LowRank)
        assert (row["route"], row["rank_before"], row["rank_after"]) == ("dora -> lowrank", 4, 16)
        d = dora[row["name"]].delta(weights[row["name"]]).dense()
        error = np.linalg.norm(u.dense() - d) / np.linalg.norm(d)
        assert row["relative_error"] == pytest.approx(error, rel=1e-2)
    assert len(said["modules"]) == len(dora)
    assert said["total"]["relative_error"] == max(row["relative_error"] for row in said["modules"])
    assert 0 < said["total"]["type_error"] <= said["total"]["relative_error"]
    assert "only near as lora" in said["warnings"][0]
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["use_dora"], config["r"]) == (False, 16)
    assert not any("magnitude" in key for key in _keys(tmp_path / "lora"))


def _keys(folder: Path) -> list[str]:
    with safe_open(folder / "adapter_model.safetensors", "np") as file:
        return list(file.keys())


def test_lora_to_dora_and_into_another_format(run: Callable[..., Any], tmp_path: Path) -> None:
    done = run(
        "convert", DIGITS / "r4", "--to", "kohya", "--type", "dora", "--base", BASE, "-o", tmp_path / "d.safetensors"
    )
    assert done.code == 0
    back = lt.load(tmp_path / "d.safetensors", base=BASE)
    before, weights = lt.load(DIGITS / "r4"), Base.open(BASE)
    for name, u in before.items():
        assert isinstance(back[name], Dora)
        assert np.allclose(back[name].apply(weights[name]), u.apply(weights[name]), atol=1e-6)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--type", "lora"], "--base BASE"),
        (["--type", "doro"], "did you mean"),
        (["--rank", "4"], "expected: --type"),
        (["--type", "lora", "--set", "exact=perhaps", "--base", BASE], "true or false"),
        (["--type", "lora", "--set", "nonsense=1", "--base", BASE], "no option of peft or lora"),
        (["--type", "lora", "--rank", "0", "--base", BASE], "--rank"),
        (["--initial", DIGITS / "r4"], "relative to the original base already"),
    ],
)
def test_wrong_words(words: list[Any], told: str, run: Callable[..., Any], tmp_path: Path) -> None:
    done = run("convert", DIGITS / "r4-dora", "--to", "peft", "-o", tmp_path / "out", *words)
    assert (done.code, done.out) == (2, "")
    assert told in done.err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def altered(adapter: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path, Path, Any]:
    """A trained PiSSA adapter of one module, as it was saved before, the original base, and the true update."""
    rng = np.random.default_rng(3)
    w = (rng.standard_normal((8, 6)) * [8, 4, 2, 1, 0.5, 0.1]).astype(np.float32)
    u, s, vh = np.linalg.svd(w.astype(np.float64), full_matrices=False)
    root = np.sqrt(s[:4] / 2)  # lora_alpha / r = 2
    a0, b0 = root[:, None] * vh[:4], u[:, :4] * root
    a, b = (x + 0.05 * rng.standard_normal(x.shape) for x in (a0, b0))
    (tmp_path / "base").mkdir()
    save_file({"q.weight": w}, tmp_path / "base" / "model.safetensors")

    def saved(name: str, a: Any, b: Any, init: Any) -> Path:
        tensors = {"lora_A": a, "lora_B": b}
        made = adapter(
            {f"base_model.model.q.{k}.weight": np.ascontiguousarray(x, np.float32) for k, x in tensors.items()},
            init_lora_weights=init,
        )
        return made.rename(tmp_path / name)

    first = saved("first", a0, b0, True)
    return saved("last", a, b, "pissa"), first, tmp_path / "base", 2 * (b @ a - b0 @ a0)


@pytest.mark.parametrize("by", ["initial", "base", "type"])
def test_an_altered_base(
    by: str, altered: tuple[Path, Path, Path, Any], run: Callable[..., Any], tmp_path: Path
) -> None:
    last, first, base, d = altered
    words = {
        "initial": ["--to", "peft", "--initial", first],
        "base": ["--to", "kohya", "--base", base],
        "type": ["--to", "peft", "--type", "lora", "--base", base],
    }[by]
    out = tmp_path / ("k.safetensors" if by == "base" else "plain")
    done = run("convert", last, *words, "-o", out, "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert "rank 4 -> 6" in said["warnings"][0]
    assert said["modules"][0]["rank_before"] == 4
    (u,) = lt.load(out, base=base).values()
    # fp32 factors of the initial product, whose size is that of the base
    assert np.abs(u.dense() - d).max() <= 1e-5 * 20  # type: ignore[attr-defined]
    if by != "base":
        assert json.loads((out / "adapter_config.json").read_text())["init_lora_weights"] is True


def test_an_altered_base_is_never_forgotten(
    altered: tuple[Path, Path, Path, Any], run: Callable[..., Any], tmp_path: Path
) -> None:
    last = altered[0]
    done = run("convert", last, "--to", "kohya", "-o", tmp_path / "k.safetensors")
    assert done.code == 2
    assert "--initial DIR" in done.err
    assert "--base BASE" in done.err
    assert run("convert", last, "--to", "kohya", "--altered-base", "-o", tmp_path / "k.safetensors").code == 0
    assert run("convert", last, "--to", "peft", "-o", tmp_path / "same").code == 0  # says what it is itself
    said = json.loads((tmp_path / "same" / "adapter_config.json").read_text())
    assert said["init_lora_weights"] == "pissa"
