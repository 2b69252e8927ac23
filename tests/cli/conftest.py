"""The command line in this process, and PEFT directories to break."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from loratools.cli import main as cli


class Result(NamedTuple):
    """What a run of the command line gave."""

    code: int
    out: str
    err: str


@pytest.fixture
def run() -> Callable[..., Result]:
    """run("squeeze", path, ...) -> Result, through the error boundary."""

    def call(*args: object) -> Result:
        done: list[int] = []

        @click.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
        @click.argument("words", nargs=-1, type=click.UNPROCESSED)
        def command(words: tuple[str, ...]) -> None:
            done.append(cli._code(list(words)))

        result = CliRunner().invoke(command, [str(a) for a in args])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Result(done[0], result.stdout, result.stderr)

    return call


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[..., Path]:
    """adapter(tensors={...}, config={...}) -> a PEFT directory, by default small and right."""

    def make(tensors: dict[str, Any] | None = None, config: Any = None, **changes: Any) -> Path:
        folder = tmp_path / "adapter"
        folder.mkdir(exist_ok=True)
        rng = np.random.default_rng(0)
        right = {
            "base_model.model.q.lora_A.weight": rng.standard_normal((4, 6)).astype(np.float32),
            "base_model.model.q.lora_B.weight": rng.standard_normal((8, 4)).astype(np.float32),
        }
        save_file({**right, **(tensors or {})}, folder / "adapter_model.safetensors")
        said = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"], **changes}
        text = config if isinstance(config, str) else json.dumps(said if config is None else config)
        (folder / "adapter_config.json").write_text(text)
        return folder

    return make
