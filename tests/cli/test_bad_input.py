"""Bad input is one clear message with the file and the module, exit code 2, nothing written, nothing lost."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

A, B = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"


def f32(*shape: int) -> np.ndarray[Any, Any]:
    return np.ones(shape, np.float32)


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"r": "8"}, "r is no rank"),
    ({"r": None}, "r is no rank"),
    ({"r": -4}, "r is no rank"),
    ({"r": 0}, "r is no rank"),
    ({"r": 10**9}, "r is no rank"),
    ({"r": True}, "r is no rank"),
    ({"r": 4.0}, "r is no rank"),
    ({"lora_alpha": "16"}, "lora_alpha is no number"),
    ({"lora_alpha": None}, "lora_alpha is no number"),
    ({"rank_pattern": {"q[": 4}}, "no regular expression"),
    ({"alpha_pattern": {"(a+)+$": 4}}, "backtrack"),
    ({"rank_pattern": [4]}, "rank_pattern is not a table"),
    ({"rank_pattern": {"q": "4"}}, "is no rank"),
    ({"use_rslora": "yes"}, "use_rslora is neither"),
    ({"bias": "some"}, "bias has an unknown value"),
    ({"peft_type": "NOVEL"}, "peft_type NOVEL"),
]


@pytest.mark.parametrize(("changes", "what"), CONFIGS)
def test_broken_settings(
    run: Callable[..., Any], adapter: Callable[..., Path], tmp_path: Path, changes: Any, what: str
) -> None:
    extra = {"base_model.model.q.bias": f32(8)} if "bias" in changes else None
    folder = adapter(extra, **changes)
    result = run("squeeze", folder, "--rank", 2, "-o", tmp_path / "out")
    assert (result.code, result.out) == (2, "")
    assert what in result.err
    assert str(folder) in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "what"),
    [("{", "JSON"), ("[]", "object"), ('{"r": 1, "r": 2}', "twice"), ('{"peft_type": "LORA", "lora_alpha": 1}', "r"),
     ('{"peft_type": "LORA", "r": 4}', "lora_alpha"), ('{"r": 4, "lora_alpha": 1}', "peft_type")],
)  # fmt: skip
def test_broken_configs(run: Callable[..., Any], adapter: Callable[..., Path], config: str, what: str) -> None:
    result = run("info", adapter(config=config))
    assert result.code == 2
    assert what in result.err
    assert "adapter" in result.err


def test_missing_config(run: Callable[..., Any], adapter: Callable[..., Path]) -> None:
    folder = adapter()
    (folder / "adapter_config.json").unlink()
    result = run("squeeze", folder / "adapter_model.safetensors", "--rank", 2)
    assert result.code == 2
    assert "adapter_config.json" in result.err


TENSORS: list[tuple[dict[str, Any], str]] = [
    ({A: f32(3, 6)}, "do not multiply"),
    ({A: f32(0, 6), B: f32(8, 0)}, "no elements"),
    ({"base_model.model.k.lora_A.weight": f32(4, 6)}, "half of a factor pair"),
    ({"base_model.model.k.lora_B.weight": f32(6, 4)}, "half of a factor pair"),
    ({"base_model.model.k.something": f32(4)}, "does not explain"),
    ({A: np.full((4, 6), np.nan, np.float32)}, "finite"),
    ({B: np.full((8, 4), np.inf, np.float32)}, "finite"),
]


@pytest.mark.parametrize(("tensors", "what"), TENSORS)
def test_broken_tensors(
    run: Callable[..., Any], adapter: Callable[..., Path], tmp_path: Path, tensors: Any, what: str
) -> None:
    folder = adapter(tensors)
    result = run("squeeze", folder, "--rank", 2, "-o", tmp_path / "out")
    assert (result.code, result.out) == (2, "")
    assert what in result.err
    assert "module: " in result.err
    assert str(folder) in result.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]


def test_non_finite_modules_pass_through_on_request(
    run: Callable[..., Any], adapter: Callable[..., Path], tmp_path: Path
) -> None:
    folder = adapter({A: np.full((4, 6), np.nan, np.float32)})
    result = run("squeeze", folder, "--rank", 2, "-o", tmp_path / "out", "--allow-nonfinite", "--json")
    assert result.code == 0
    assert '"relative_error": null' in result.out


@pytest.mark.parametrize(
    "args",
    [
        "",
        "--rank 0",
        "--rank -1",
        "--rank x",
        "--rank 2 --energy 0.5",
        "--energy 2",
        "--error -1",
        "--rank 2 --max-rank 0",
        "--rank 2 --fail-on x>",
        "--rank 2 --base /nowhere",
        "--rank 2 --format pfet",
        "--rank noise",
        "--size 10",
        "--size 10XB",
    ],
)
def test_wrong_usage(run: Callable[..., Any], adapter: Callable[..., Path], args: str) -> None:
    result = run("squeeze", adapter(), *args.split())
    assert result.code == 2
    assert result.err


def test_a_rank_larger_than_every_matrix_changes_nothing(
    run: Callable[..., Any], adapter: Callable[..., Path], tmp_path: Path
) -> None:
    assert (
        run("squeeze", adapter(), "--rank", 4000, "-o", tmp_path / "out", "--fail-on", "relative_error>1e-6").code == 0
    )


def test_an_existing_output_is_an_error_before_any_work(
    run: Callable[..., Any], adapter: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run("squeeze", adapter(), "--rank", 2, "-o", out).code == 0
    before = (out / "adapter_model.safetensors").read_bytes()
    result = run("squeeze", adapter(), "--rank", 1, "-o", out)
    assert result.code == 2
    assert "--overwrite" in result.err
    assert (out / "adapter_model.safetensors").read_bytes() == before
    assert run("squeeze", adapter(), "--rank", 1, "-o", out, "--overwrite").code == 0
    assert (out / "adapter_model.safetensors").read_bytes() != before


def test_the_output_is_never_the_input(run: Callable[..., Any], adapter: Callable[..., Path], tmp_path: Path) -> None:
    folder = adapter()
    before = (folder / "adapter_model.safetensors").read_bytes()
    (tmp_path / "link").symlink_to(folder)
    os.link(folder / "adapter_model.safetensors", tmp_path / "hard.safetensors")
    for out in (
        folder,
        tmp_path / "link",
        folder / "adapter_model.safetensors",
        tmp_path / "hard.safetensors",
        folder / ".." / "adapter",
    ):
        result = run("squeeze", folder, "--rank", 1, "-o", out, "--overwrite")
        assert result.code == 2, out
        assert (folder / "adapter_model.safetensors").read_bytes() == before


def test_a_full_disk(
    run: Callable[..., Any], adapter: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = adapter()
    monkeypatch.setattr(os, "pwrite", full)
    result = run("squeeze", folder, "--rank", 2, "-o", tmp_path / "out")
    assert result.code == 2
    assert "space" in result.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]


def test_a_kill_while_saving_leaves_the_old_output(adapter: Callable[..., Path], tmp_path: Path) -> None:
    script = f"""
import os, signal
from loratools.cli.main import _code
args = ["squeeze", {str(adapter())!r}, "--rank", "2", "-o", {str(tmp_path / "out")!r}]
assert _code([*args, "-q"]) == 0
real = os.pwrite
def die(*a):
    real(*a)
    os.kill(os.getpid(), signal.SIGKILL)
os.pwrite = die
_code([*args, "--overwrite"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    import loratools as lt

    assert lt.load(tmp_path / "out")["q.weight"].rank == 2
    assert {p.name for p in tmp_path.iterdir() if not p.name.startswith(".")} == {"adapter", "out"}


def test_a_pickle_that_would_execute_something_does_not(run: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("torch")

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'executed'}",)

    path = tmp_path / "adapter_model.bin"
    path.write_bytes(pickle.dumps({A: Evil()}))
    result = run("squeeze", path, "--rank", 2)
    assert result.code == 2
    assert not (tmp_path / "executed").exists()


def test_extracting_from_equal_models_says_so(run: Callable[..., Any], tmp_path: Path) -> None:
    base = Path(__file__).parents[2] / "fixtures" / "digits" / "base"
    done = run("extract", base, base, "--rank", "2", "-o", tmp_path / "out")
    assert (done.code, done.out) == (2, "")
    assert "nothing to write" in done.err
    assert not (tmp_path / "out").exists()
