"""Every command: documented, runs on every fixture, turns errors into one message and exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from loratools.cli import main as cli

COMMANDS = cli.main.list_commands(None)  # type: ignore[arg-type]
FIXTURES = sorted(p.parent for p in (Path(__file__).parents[2] / "fixtures").glob("*/*/adapter_model.safetensors"))
BASE = Path(__file__).parents[2] / "fixtures" / "digits" / "base"
FRONT = {"merge": [BASE], "unmerge": [BASE], "extract": [BASE], "switch": [BASE, "--on"]}  # what comes before the input
# not every adapter is an input of theirs
SPECIAL = {"collapse", "unmerge", "extract", "recover", "routing", "switch", "dequantize", "stats"}
TARGETS = {
    "check": ["--for", "peft"],
    "collapse": ["--mean", "--dry-run"],
    "convert": ["--to", "native", "--dry-run"],
    "extract": ["--rank", "2", "--dry-run"],
    "compare": ["--base", str(BASE)],
    "fuse": ["--base", str(BASE), "--dry-run"],
    "merge": ["--dry-run"],
    "quantize": ["--bits", "1", "--dry-run"],
    "dequantize": ["--dry-run"],
    "resize": ["--rank", "2", "--dry-run"],
    "shira": ["--density", "0.1", "--to", "native", "--base", str(BASE), "--dry-run"],
    "slice": ["--rank", "1", "--scale-rule", "keep", "--dry-run"],
    "squeeze": ["--rank", "2", "--dry-run"],
    "stats": ["--inputs", str(FIXTURES[0]), "--dry-run"],
    "tame": ["--base", str(FIXTURES[0].parent / "base"), "--dry-run"],
}


def run(*args: object) -> tuple[int, str, str]:
    """Run the command line in this process, through its error boundary."""
    done: list[int] = []
    result = CliRunner().invoke(_boundary(done), [str(a) for a in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return done[0], result.stdout, result.stderr


def _boundary(done: list[int]):  # type: ignore[no-untyped-def]
    @click.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
    @click.argument("args", nargs=-1, type=click.UNPROCESSED)
    def command(args: tuple[str, ...]) -> None:
        done.append(cli._code(list(args)))

    return command


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_complete(name: str) -> None:
    code, out, _ = run(name, "--help")
    assert code == 0
    command = cli.main.get_command(None, name)  # type: ignore[arg-type]
    assert command is not None
    assert command.help
    assert command.short_help
    for parameter in command.params:
        assert not isinstance(parameter, click.Option) or parameter.help, parameter.name
    assert "Usage: loratools" in out


@pytest.mark.parametrize("folder", FIXTURES, ids=lambda p: p.name)
@pytest.mark.parametrize("name", COMMANDS)
def test_runs_on_every_fixture(name: str, folder: Path) -> None:
    if name in SPECIAL:
        pytest.skip("has tests of its own inputs")
    code, out, err = run(name, *FRONT.get(name, []), folder, *TARGETS.get(name, []), "--json")
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert said["schema"].startswith(f"loratools.{name}/")
    assert {"loratools", "inputs", "output", "total", "modules", "checks", "warnings"} <= said.keys()
    assert said["inputs"][0]["sha256"]


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    "content", [b"", b"\0" * 64, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"hello"]
)
def test_bad_files_are_one_message_and_exit_2(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "in.safetensors"
    path.write_bytes(content)
    code, out, err = run(name, *FRONT.get(name, []), path, *TARGETS.get(name, []))
    assert (code, out) == (2, "")
    assert err.startswith("loratools: ")
    assert str(path) in err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", COMMANDS)
def test_missing_input_and_wrong_usage(name: str, tmp_path: Path) -> None:
    assert run(name, *FRONT.get(name, []), tmp_path / "nowhere", *TARGETS.get(name, []))[0] == 2
    assert run(name)[0] == 2
    assert run(name, "--no-such-option")[0] == 2


def test_unknown_command() -> None:
    assert run("squeze")[0] == 2


def test_a_bug_is_reported_as_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(cli.main, "main", broken)
    code, _, err = run("info")
    assert code == 3
    assert "please report" in err


def test_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.main, "main", interrupted)
    assert run("info")[0] == 130
