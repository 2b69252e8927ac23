"""``loratools check`` as users and CI run it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from loratools.cli import _gather
from loratools.cli.main import main
from loratools.errors import LoratoolsError

Result = tuple[int, str, str]


def run(*args: object) -> Result:
    result = CliRunner().invoke(main, ["check", *map(str, args)], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.return_value, result.stdout, result.stderr  # type: ignore[return-value]


@pytest.fixture
def two(digits: Path, tmp_path: Path) -> Path:
    for name in ("one", "two"):
        shutil.copytree(digits / "r32", tmp_path / "all" / name)
    config = tmp_path / "all" / "two" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_rslora": True}))
    return tmp_path / "all"


def test_one_table_for_a_directory_of_adapters(two: Path) -> None:
    code, out, _ = run(two, "--for", "vllm", "--for", "peft")
    table = out.split("\n\n")[0]
    assert code in (0, 1)
    assert len(table.splitlines()) == 1 + 4 + 1
    assert str(two / "two") in table


def test_patterns_and_json(two: Path) -> None:
    code, out, _ = run(f"{two}/t*", "--for", "sglang", "--json")
    said = json.loads(out)
    assert code == 1
    assert [row["id"] for row in said["findings"] if row["level"] == "error"] == ["sglang/strength"]
    finding = said["findings"][0]
    assert finding["source"]
    assert finding["mend"] == f"loratools check {two / 'two'} --for sglang --fix -o OUT"
    assert said["inputs"][0]["sha256"]


def test_fix_writes_and_passes(two: Path, tmp_path: Path) -> None:
    code, out, _ = run(two / "two", "--for", "sglang", "--fix", "-o", tmp_path / "out")
    assert code == 0
    assert f"wrote {tmp_path / 'out'}" in out
    assert run(tmp_path / "out", "--for", "sglang", "--quiet")[:2] == (0, "")


def test_fix_that_cannot_be_exact_writes_nothing(two: Path, tmp_path: Path) -> None:
    code, out, _ = run(two / "two", "--for", "llama.cpp", "--fix", "-o", tmp_path / "out.gguf")
    assert code == 1
    assert "nothing written" in out
    assert not (tmp_path / "out.gguf").exists()


def test_sarif_and_annotations(two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    code, out, err = run(two, "--for", "sglang", "--sarif", tmp_path / "log.sarif", "--json")
    assert code == 1
    json.loads(out)
    assert err.startswith("::error file=")
    log = json.loads((tmp_path / "log.sarif").read_text())
    assert log["runs"][0]["results"][0]["ruleId"] == "sglang/strength"


def test_wrong_usage(two: Path, tmp_path: Path) -> None:
    for args in (
        [two, "--for", "vllm", "--fix", "-o", tmp_path / "out"],  # two adapters
        [two / "one", "--for", "vllm", "--fix"],
        [two / "one", "--for", "vllm", "-o", tmp_path / "out"],
        [two / "one", "--for", "nobody"],
        [tmp_path / "no*thing", "--for", "vllm"],
    ):
        with pytest.raises(LoratoolsError):
            run(*args)


def test_gathering(two: Path, digits: Path) -> None:
    assert _gather.gathered([str(two)]) == [two / "one", two / "two"]
    assert _gather.gathered([f"{two}/*", str(two / "one")]) == [two / "one", two / "two"]
    assert _gather.gathered([str(digits / "r32")]) == [digits / "r32"]
    assert _gather.gathered(["no/such*"]) == [Path("no/such*")]
