"""The benchmark and the tuner of the GPU run here on tiny shapes: one call must do on a machine that has one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"
TABLE = Path(__file__).parents[2] / "kernels" / "blocks.json"


@pytest.mark.slow
@pytest.mark.parametrize("command", [["gpu.py", "--check-only"], ["gpu_tune.py", "--dry-run"]], ids=lambda c: c[0])
def test_every_line_runs(command: list[str]) -> None:
    before = TABLE.read_bytes()
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    argv = [sys.executable, str(BENCH / command[0]), *command[1:]]
    done = subprocess.run(argv, capture_output=True, text=True, env=env, cwd="/", check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert TABLE.read_bytes() == before
