"""What benchmarks share: model shapes, made adapters, whole-process measurement, and where results go."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

Shapes = dict[str, tuple[int, int]]  # module -> (out, in)
SHAPES: dict[str, tuple[int, Shapes]] = {
    # layers, module shapes
    "7b": (
        32,
        {
            **{f"self_attn.{x}_proj": (4096, 4096) for x in "qkvo"},
            "mlp.gate_proj": (11008, 4096),
            "mlp.up_proj": (11008, 4096),
            "mlp.down_proj": (4096, 11008),
        },
    ),
    "1.1b": (
        22,
        {
            "self_attn.q_proj": (2048, 2048),
            "self_attn.k_proj": (256, 2048),
            "self_attn.v_proj": (256, 2048),
            "self_attn.o_proj": (2048, 2048),
            "mlp.gate_proj": (5632, 2048),
            "mlp.up_proj": (5632, 2048),
            "mlp.down_proj": (2048, 5632),
        },
    ),
    "small": (12, {"self_attn.q_proj": (1024, 1024), "self_attn.v_proj": (1024, 1024)}),
}


def factors(rng: np.random.Generator, m: int, n: int, r: int) -> tuple[np.ndarray, np.ndarray]:
    """Return b, a whose product has singular values near j^-p + 1%, p drawn from 0.6 .. 1.4, hidden by a rotation.

    As training leaves it: a is flat (it began random), the spectrum sits in b.
    """
    s = np.arange(1, r + 1) ** -rng.uniform(0.6, 1.4) + 0.01
    q, _ = np.linalg.qr(rng.standard_normal((r, r)))
    b = (rng.standard_normal((m, r)) * s) @ q / np.sqrt(m)
    return b, q.T @ rng.standard_normal((r, n)) / np.sqrt(n)


def make_adapter(folder: Path, model: str, rank: int, dtype: str, *, layers: int | None = None, seed: int = 0) -> Path:
    """Write a PEFT adapter of the given model's shapes (seeded) and return its folder."""
    import ml_dtypes  # noqa: F401 - registers bfloat16 by name
    from safetensors.numpy import save_file

    count, shapes = SHAPES[model]
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(layers or count):
        for module, (m, n) in shapes.items():
            b, a = factors(rng, m, n, rank)
            path = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{path}.lora_A.weight"] = a.astype(dtype)
            tensors[f"{path}.lora_B.weight"] = b.astype(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = [module.split(".")[1] for module in shapes]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets,
              "base_model_name_or_path": "made/up", "bias": "none", "task_type": "CAUSAL_LM"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def measure(commands: dict[str, list[str]], runs: int) -> dict[str, dict[str, Any]]:
    """Run commands in turns as whole processes; return name -> walls, peaks and their medians."""
    spec = json.dumps([{"name": name, "argv": argv} for name, argv in commands.items()])
    out = subprocess.run(
        [sys.executable, str(HERE / "measure.py"), str(runs), spec], check=True, capture_output=True, text=True
    )
    found = json.loads(out.stdout)
    return {
        name: {**rows, "median_s": statistics.median(rows["wall_s"]), "peak_mb_max": max(rows["peak_mb"])}
        for name, rows in found.items()
    }


def write(name: str, figures: dict[str, Any], out: Path | None) -> None:
    """Write the results with machine, versions and commit; print them too."""
    result = {"benchmark": name, "machine": machine(), "versions": versions(), "commit": commit(), **figures}
    text = json.dumps(result, indent=1)
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")


def machine() -> dict[str, Any]:
    """Processor, cores and memory."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next(
        (line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")),
        platform.processor(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"processor": model, "cores": os.cpu_count(), "memory_gib": round(memory, 1), "system": platform.system()}


def versions() -> dict[str, str]:
    """Versions of what was measured."""
    found = {"python": platform.python_version()}
    for package in ("loratools", "numpy", "scipy", "torch", "peft", "gradience", "safetensors"):
        try:
            found[package] = version(package)
        except Exception:
            continue
    return found


def commit() -> str:
    """The commit measured, with + for a tree that differs from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    dirty = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=False
    ).stdout
    return head + ("+" if dirty.strip() else "")
