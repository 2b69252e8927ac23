from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import loratools as lt
from loratools.errors import LoratoolsError


@pytest.fixture
def peft(adapter: Callable[..., Path]) -> Path:
    folder = adapter()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("---\ntags: [x]\n---\n# Mine\n")
    (folder / "optimizer.pt").write_bytes(b"state")
    return folder


def test_a_directory_becomes_a_complete_directory_beside_it(run: Callable[..., Any], peft: Path) -> None:
    result = run("squeeze", peft, "--rank", 2)
    out = peft.with_name("adapter-r2")
    assert result.code == 0
    assert f"wrote {out}" in result.out
    assert {p.name for p in out.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
        "tokenizer.json",
    }
    readme = (out / "README.md").read_text()
    assert readme.startswith("---\ntags: [x]\n---\n# Mine\n")
    assert "squeeze rank=2" in readme


@pytest.mark.parametrize(
    ("given", "args", "name"),
    [(".", ["--rank", "3"], "adapter-r3"), ("adapter_model.safetensors", ["--energy", "0.5"], "adapter-energy0.5")],
)
def test_default_names(run: Callable[..., Any], peft: Path, given: str, args: list[str], name: str) -> None:
    assert run("squeeze", peft / given, *args).code == 0
    assert lt.load(peft.with_name(name))


def test_a_single_file_becomes_a_single_file(run: Callable[..., Any], peft: Path, tmp_path: Path) -> None:
    native = lt.save(lt.load(peft), tmp_path / "in.safetensors", format="native")
    assert run("squeeze", native, "--rank", 2).code == 0
    assert lt.load(tmp_path / "in-r2.safetensors")["q.weight"].rank == 2


def test_an_explicit_file_gets_its_config_beside_it(run: Callable[..., Any], peft: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    assert run("squeeze", peft, "--rank", 2, "-o", tmp_path / "there" / "x.safetensors").code == 0
    assert sorted(p.name for p in (tmp_path / "there").iterdir()) == ["adapter_config.json", "x.safetensors"]
    assert lt.load(tmp_path / "there" / "x.safetensors")["q.weight"].rank == 2


def test_a_config_beside_the_input_is_not_overwritten(run: Callable[..., Any], peft: Path) -> None:
    before = (peft / "adapter_config.json").read_text()
    result = run("squeeze", peft, "--rank", 2, "-o", peft / "small.safetensors", "--overwrite")
    assert result.code == 2
    assert (peft / "adapter_config.json").read_text() == before
    assert not (peft / "small.safetensors").exists()


def test_json_is_the_documented_object_and_nothing_else(run: Callable[..., Any], peft: Path, tmp_path: Path) -> None:
    result = run("squeeze", peft, "--rank", 2, "-o", tmp_path / "out", "--json", "--fail-on", "relative_error>0.9")
    said = json.loads(result.out)
    assert said["schema"] == "loratools.squeeze/1"
    assert said["output"]["path"] == str(tmp_path / "out")
    figures = {"rank_before", "rank_after", "energy", "relative_error", "bytes_before", "bytes_after"}
    assert figures <= said["modules"][0].keys()
    assert figures <= said["total"].keys()
    value = said["modules"][0]["relative_error"]
    assert said["checks"] == [{"expr": "relative_error>0.9", "value": value, "ok": True, "module": "q.weight"}]


def test_a_failed_gate_exits_1_and_writes_nothing(run: Callable[..., Any], peft: Path, tmp_path: Path) -> None:
    result = run("squeeze", peft, "--rank", 1, "-o", tmp_path / "out", "--fail-on", "relative_error>0.001")
    assert result.code == 1
    assert "gate failed: relative_error>0.001" in result.err
    assert "q.weight" in result.err
    assert not (tmp_path / "out").exists()


def test_dry_run_and_quiet(run: Callable[..., Any], peft: Path, tmp_path: Path) -> None:
    result = run("squeeze", peft, "--rank", 1, "-o", tmp_path / "out", "--dry-run")
    assert result.code == 0
    assert "nothing written" in result.out
    assert not (tmp_path / "out").exists()
    assert run("squeeze", peft, "--rank", 1, "-o", tmp_path / "out", "-q") == (0, "", "")


def test_dtype(run: Callable[..., Any], peft: Path, tmp_path: Path) -> None:
    assert run("squeeze", peft, "--rank", 2, "-o", tmp_path / "out", "--dtype", "bfloat16").code == 0
    assert lt.load(tmp_path / "out")["q.weight"].b.dtype == "bfloat16"


def test_many_modules_show_the_worst(run: Callable[..., Any], digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits / "r32", tmp_path / "in")
    result = run("squeeze", tmp_path / "in", "--rank", 4)
    assert result.code == 0
    assert result.out.splitlines()[0].split()[0] == "module"
    assert "total" in result.out


def test_a_file_among_other_weights_is_refused_for_its_config_would_speak_for_them(
    run: Callable[..., Any], peft: Path, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    assert run("squeeze", peft, "--rank", 2, "-o", tmp_path / "there" / "a.safetensors").code == 0
    before = (tmp_path / "there" / "adapter_config.json").read_text()
    for name, more in (("b.safetensors", []), ("b.safetensors", ["--overwrite"]), ("b.safetensors", ["--dry-run"])):
        result = run("squeeze", peft, "--rank", 3, "-o", tmp_path / "there" / name, *more)
        assert result.code == (0 if "--dry-run" in more else 2)
    assert (tmp_path / "there" / "adapter_config.json").read_text() == before
    assert run("squeeze", peft, "--rank", 3, "-o", tmp_path / "there" / "a.safetensors", "--overwrite").code == 0
    assert lt.load(tmp_path / "there" / "a.safetensors")["q.weight"].rank == 3


def test_a_kill_between_weights_and_config_leaves_no_wrong_adapter(peft: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    script = f"""
import os, pathlib, signal
from loratools.cli.main import _code
args = ["squeeze", {str(peft)!r}, "-o", {str(tmp_path / "there" / "a.safetensors")!r}, "-q", "--overwrite"]
assert _code([*args, "--rank", "2", "--keep-alpha"]) == 0
real = pathlib.Path.replace
def die(self, target):
    real(self, target)
    os.kill(os.getpid(), signal.SIGKILL)
pathlib.Path.replace = die
_code([*args, "--rank", "3"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with pytest.raises(LoratoolsError, match="adapter_config"):
        lt.load(tmp_path / "there" / "a.safetensors")


def test_readmes_survive_and_list_everything_done(run: Callable[..., Any], peft: Path, tmp_path: Path) -> None:
    (peft / "README.md").write_bytes(b"# caf\xe9\n")
    assert run("squeeze", peft, "--rank", 3, "-o", tmp_path / "a").code == 0
    (tmp_path / "a" / "README.md").write_bytes((tmp_path / "a" / "README.md").read_bytes() + b"\nmine\n")
    assert run("squeeze", tmp_path / "a", "--rank", 2, "-o", tmp_path / "b").code == 0
    text = (tmp_path / "b" / "README.md").read_bytes()
    assert text.startswith(b"# caf\xe9\n")
    assert b"mine" in text
    assert text.count(b"Changes made by loratools") == 1
    assert b"squeeze rank=2" in text


def test_statistics_weigh_and_are_gated(run: Callable[..., Any], adapter: Callable[..., Path], tmp_path: Path) -> None:
    folder, out = adapter(), tmp_path / "out"
    save_file({"q.in_diag": np.array([9, 1, 1, 1, 1, 0.1], np.float32)}, tmp_path / "stats.safetensors")
    done = run("squeeze", folder, "--rank", "2", "--stats", tmp_path / "stats.safetensors", "-o", out)
    assert done.code == 0
    assert "weighted" in done.out.splitlines()[0]
    gate = ["--fail-on", "weighted_error>0.0001", "-o", tmp_path / "gated"]
    assert run("squeeze", folder, "--rank", "2", "--stats", tmp_path / "stats.safetensors", *gate).code == 1
    assert not (tmp_path / "gated").exists()
    for stats, said in (
        ("norm", "in the base"),
        (tmp_path / "nowhere", "no such file"),
        (folder / "adapter_model.safetensors", "are no statistics"),
    ):
        bad = run("squeeze", folder, "--rank", "2", "--stats", stats, "-o", tmp_path / "bad")
        assert bad.code == 2, stats
        assert said in bad.err, stats
    save_file({"q.in_diag": np.array([9, -1, 1, 1, 1, 0.1], np.float32)}, tmp_path / "negative.safetensors")
    bad = run("resize", folder, "--rank", "2", "--stats", tmp_path / "negative.safetensors", "-o", tmp_path / "bad")
    assert (bad.code, "negative.safetensors" in bad.err, "q" in bad.err) == (2, True, True)
    assert not (tmp_path / "bad").exists()


def test_nested_keeps_every_rank_by_itself(
    run: Callable[..., Any], adapter: Callable[..., Path], tmp_path: Path
) -> None:
    folder = adapter()
    done = run("squeeze", folder, "--nested", "--json")
    assert done.code == 0
    said = json.loads(done.out)
    assert (said["target"], said["total"]["rank_after"]) == ("nested", 4)
    assert said["output"]["path"] == str(folder.with_name("adapter-nested"))
    sliced = run(
        "slice",
        folder.with_name("adapter-nested"),
        "--rank",
        "2",
        "--scale-rule",
        "keep",
        "--json",
        "-o",
        tmp_path / "s",
    )
    row = json.loads(sliced.out)["modules"][0]
    assert row["prefix_error"] == pytest.approx(row["optimal_error"], rel=1e-5)
