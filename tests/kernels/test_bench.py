"""The benchmark and the tuner of the GPU run here on tiny shapes: one call must do on a machine that has one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loratools.kernels import blocks

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


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench() -> Any:
    return load("gpu")


def test_figures_are_written_one_by_one_and_a_part_that_fails_stops_no_other(bench, tmp_path, capsys):
    def figures() -> Iterator[tuple[str, Any]]:
        yield "first", 1
        assert json.loads((tmp_path / "x.json").read_text())["norms"] == {"first": 1}
        raise RuntimeError("no memory")

    run = bench.Run(bench.gpu.Machine(tiny=True), bench.gpu.Clock(100), tmp_path / "x.json")
    run.part("norms", figures)
    run.part("rsvd", lambda: iter([("second", 2)]))
    told = json.loads((tmp_path / "x.json").read_text())
    assert told["norms"] == {"first": 1, "failed": "RuntimeError: no memory"}
    assert told["rsvd"] == {"second": 2}
    assert run.failed
    assert "no memory" in capsys.readouterr().err


def test_what_there_is_no_time_for_is_said(bench, capsys):
    run = bench.Run(bench.gpu.Machine(tiny=True), bench.gpu.Clock(100), None)
    run.part("norms", lambda: iter([("first", 1), ("second", 2)]), needs_s=200)
    run.clock = bench.gpu.Clock(-1)
    run.part("rsvd", lambda: iter([("first", 1)]))
    assert run.found["left_out"] == ["norms", "rsvd"]
    assert "no time left: rsvd" in capsys.readouterr().out


def test_every_candidate_says_what_its_kernel_reads_and_few_enough_are_tried():
    tune, tried = load("gpu_tune"), 0
    machine = type("Machine", (), {"tiny": False})()
    for kernel, rows in blocks.table().items():
        needed = set.intersection(*(set(row["blocks"]) for row in rows)) - {"registers", "stages"}
        for row in rows:
            for s in tune.candidates(machine, kernel, row):
                assert needed - ({"warps"} if kernel == "small_svd" else set()) <= set(s)
                tried += 1
    assert tried <= 500  # half a second to compile each, on many cores; a tenth of a second to time


def test_a_library_that_carries_another_lends_it(bench):
    folder = bench.gpu.carried("array_api_compat")
    assert (folder / "torch" / "__init__.py").exists()
    with pytest.raises(SystemExit, match="neither installed nor carried"):
        bench.gpu.carried("nothing_of_the_kind")
