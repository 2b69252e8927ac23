"""`loratools compare` as a user types it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
PNG = b"\x89PNG"


def test_pairs_and_a_recommendation_with_evidence(run: Run, digits: Path) -> None:
    code, told, err = run("compare", digits / "group-56", digits / "group-78", digits / "r4")
    assert (code, err) == (0, "")
    assert "group-56 | group-78" in told
    assert "Community 1: group-56, group-78, r4" in told
    assert "Alike (1 pair)" in told
    assert "group-56 and r4: cosine 0.52" in told
    assert "262144 evenly spaced entries per module" in told


def test_json_has_every_pair_and_group(run: Run, digits: Path) -> None:
    code, told, err = run("compare", digits / "group-*", "--json")
    assert (code, err) == (0, "")
    said = json.loads(told)
    assert said["schema"] == "loratools.compare/1"
    assert len(said["modules"]) == 3
    assert set(said["modules"][0]["groups"]) == {"mlp.fc1", "mlp.fc2", "self_attn.q_proj", "self_attn.v_proj"}
    assert {"communities", "edges", "recommendation", "sample", "names"} <= said.keys()
    assert said["total"]["adapters"] == 3


def test_a_gate_on_pairs(run: Run, digits: Path) -> None:
    code, _, err = run("compare", digits / "group-56", digits / "r4", "--fail-on", "interference>0.5")
    assert code == 1
    assert "gate failed: interference>0.5" in err


def test_pictures(run: Run, digits: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    words = ["compare", digits / "group-56", digits / "group-78", digits / "r4", "--plots", tmp_path / "plots"]
    assert run(*words).code == 0
    names = {"cosine", "interference", "sign_conflict", "dendrogram"}
    assert {p.stem for p in (tmp_path / "plots").iterdir()} == names
    assert all(p.read_bytes().startswith(PNG) for p in (tmp_path / "plots").iterdir())
    assert "not empty" in run(*words).err
    assert run(*words, "--overwrite").code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--sample", "2000000"], "no such sample"), (["--fail-on", "cosin>1"], "no figure named 'cosin'")],
)
def test_mistakes_are_one_message(run: Run, digits: Path, words: list[str], message: str) -> None:
    code, told, err = run("compare", digits / "group-56", digits / "r4", *words)
    assert (code, told) == (2, "")
    assert message in err


def test_dora_needs_its_base(run: Run, digits: Path) -> None:
    assert "pass --base BASE" in run("compare", digits / "group-56", digits / "r4-dora").err
    assert run("compare", digits / "group-56", digits / "r4-dora", "--base", digits / "base").code == 0
