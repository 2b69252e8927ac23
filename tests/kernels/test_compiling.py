"""The interpreter lets through what a compiler does not: every kernel is compiled for sm_90, by Triton's own ptxas."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
SCRIPT = Path(__file__).with_name("compiling.py")
SHARED_LIMIT = 232448  # bytes of shared memory that one block may have
OFTEN = [
    "row_norms bf16 384",
    "row_norms_shared bf16",
    "gram bf16 64",
    "thin bf16",
    "jacobi 64",
    "sketch bf16 d",
    "turned bf16",
]


def compiled(*names: str) -> dict[str, dict[str, int]]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *names], capture_output=True, text=True, env=env, cwd="/", check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, dict[str, int]] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(not PTXAS.exists(), reason="this Triton comes without ptxas")
@pytest.mark.parametrize("names", [OFTEN, pytest.param([], marks=pytest.mark.slow)], ids=["often", "all"])
def test_compiles_for_hopper_without_tf32_or_float_atomics(names: list[str]) -> None:
    found = compiled(*names)
    assert len(found) >= len(names)
    for name, made in found.items():
        assert not made["tf32"], name
        assert not made["float_atomics"], name
        assert made["shared"] <= SHARED_LIMIT, name
        assert made["spilled"] <= 256, name
        dots = not name.startswith(("finish", "add up", "jacobi", "signs", "terms"))
        assert made["wgmma"] == (dots and ("fp32" not in name or not name.startswith(("gram", "row_norms_shared")))), (
            name
        )


@pytest.mark.skipif(not PTXAS.exists(), reason="this Triton comes without ptxas")
def test_sizes_of_one_are_constants_to_the_compiler_and_compile_too() -> None:
    names = ["row_norms bf16 384", "finish", "compose bf16", "signs", "terms", "times bf16", "turned fp32"]
    assert compiled("--ones", *names).keys() >= set(names)
