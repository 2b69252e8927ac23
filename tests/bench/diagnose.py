"""Intruder dimensions beside dense decompositions and PEFT's own, and the cost of a diagnosis without a base.

    python tests/bench/diagnose.py --out docs/bench/diagnose.json

Rows: three shapes of a 7B model (k = 10, r = 16) against two dense thin SVDs of the same matrices, once each, and one
run of PEFT's ``reduce_intruder_dimension`` on the square one; a 7B-shaped r = 64 adapter without a base against
squeeze; peak memory with a base of one layer. Weights are noise with 64 spikes, as trained ones look. Decompositions
are compared in seconds of processor time on one thread, which depend little on what else the machine does.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import os

os.environ |= dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

spec = importlib.util.spec_from_file_location("_bench", Path(__file__).with_name("_bench.py"))
assert spec is not None
assert spec.loader is not None
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

BIN = Path(sys.executable).parent
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
RANK, K, EPS = 16, 10, 0.5
NAME = "model.layers.0.proj.weight"


def module(m: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return W0 (noise and 64 spikes) and factors b, a of an update with some strong directions."""
    rng = np.random.default_rng(m + n)
    edge = m**0.5 + n**0.5
    u, _ = np.linalg.qr(rng.standard_normal((m, 64), np.float32))
    v, _ = np.linalg.qr(rng.standard_normal((n, 64), np.float32))
    w = rng.standard_normal((m, n), np.float32) + (u * (edge * (1 + 4 * np.arange(1, 65) ** -0.7))) @ v.T
    b = rng.standard_normal((m, RANK), np.float32) * np.arange(1, RANK + 1, dtype=np.float32) ** -0.7
    a = rng.standard_normal((RANK, n), np.float32)
    return w.astype(np.float32), (b * (4.0 * edge / np.linalg.norm(b) / n**0.5)).astype(np.float32), a


def timed(work: Callable[[], Any], runs: int = 1) -> tuple[float, Any]:
    """Return the least processor seconds of some runs, and the last result."""
    seconds = []
    for _ in range(runs):
        start = time.process_time()
        result = work()
        seconds.append(time.process_time() - start)
    return min(seconds), result


def ours(w: np.ndarray, b: np.ndarray, a: np.ndarray) -> dict[str, Any]:
    """Time the intruder dimensions alone, and the whole diagnosis of the module."""
    import loratools as lt
    from loratools.core.adapter import Adapter
    from loratools.core.pool import threads
    from loratools.kinds.lowrank import LowRank
    from loratools.ops.against_base import Asked, leading_cosines, matrix_of

    update, asked = LowRank(b, a), Asked(K, EPS)
    with threads(1):
        alone, _ = timed(lambda: leading_cosines(w, matrix_of(update, turned=False), asked), 3)
        whole, report = timed(lambda: lt.diagnose(Adapter({NAME: update}), base={NAME: w}, k=K, eps=EPS), 3)
    row = report.modules[0]
    chosen = ("intruder_index", "certain", "steps", "method")
    return {"intruders_s": round(alone, 3), "diagnose_s": round(whole, 3), **{name: row[name] for name in chosen}}


def dense(w: np.ndarray, b: np.ndarray, a: np.ndarray) -> tuple[float, list[int], float]:
    """Return the seconds of two thin SVDs in fp32 (the cosines not counted), what they decide, and the nearest tie."""
    tuned = w + b @ a
    first, (u0, _, _) = timed(lambda: np.linalg.svd(w, full_matrices=False))
    second, (u, _, _) = timed(lambda: np.linalg.svd(tuned, full_matrices=False))
    cosines = np.abs(u[:, :K].T @ u0).max(axis=1)
    return first + second, [j + 1 for j in range(K) if cosines[j] < EPS], float(np.abs(cosines - EPS).min())


def peft(w: np.ndarray, b: np.ndarray, a: np.ndarray) -> float:
    """Return the seconds of PEFT's reduce_intruder_dimension on a model of one such layer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    torch.set_num_threads(1)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.proj(x)

    model = get_peft_model(Model(), LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["proj"]))
    layer = model.base_model.model.proj
    with torch.no_grad():
        layer.base_layer.weight.copy_(torch.from_numpy(w))
        layer.lora_A["default"].weight.copy_(torch.from_numpy(a))
        layer.lora_B["default"].weight.copy_(torch.from_numpy(b))
    options: dict[str, Any] = {"top_k": K, "threshold_epsilon": EPS, "logging_sink": lambda *_: None}
    with redirect_stdout(io.StringIO()):
        return timed(lambda: reduce_intruder_dimension(model, **options))[0]


def shapes(with_peft: bool) -> list[dict[str, Any]]:
    """Return one row per shape; the peers are timed once."""
    rows = []
    for m, n in SHAPES:
        w, b, a = module(m, n)
        found = {"shape": f"{m} x {n}", **ours(w, b, a)}
        print(found, flush=True)
        slow, decided, tie = dense(w, b, a)
        found |= {
            "two_thin_svds_s": round(slow, 1),
            "svds_over_intruders": round(slow / found["intruders_s"]),
            "svds_over_diagnose": round(slow / found["diagnose_s"]),
            "intruders_dense": decided,
            "same": found["intruder_index"] == decided,
            "nearest_cosine_to_eps": round(tie, 4),
        }
        print(found, flush=True)
        if with_peft and m == n:
            seconds = peft(w, b, a)
            found |= {"peft_s": round(seconds, 1), "peft_over_intruders": round(seconds / found["intruders_s"])}
            print(found, flush=True)
        rows.append(found)
    return rows


def without_base(work: Path, runs: int) -> dict[str, Any]:
    source = bench.make_adapter(work / "7b", "7b", 64, "float16")
    tool = str(BIN / "loratools")
    commands = {
        "diagnose": [tool, "diagnose", str(source), "-q"],
        "squeeze": [tool, "squeeze", str(source), "--rank", "8", "-o", str(work / "out"), "--overwrite", "-q"],
    }
    found = bench.measure(commands, runs)
    ratio = found["diagnose"]["median_s"] / found["squeeze"]["median_s"]
    return {"shape": "7B, r=64, fp16, 320 MB", "runs": found, "diagnose_over_squeeze": round(ratio, 2)}


def memory(work: Path) -> dict[str, Any]:
    """Peak of the whole process on one layer of 7B shapes in fp16; the largest parameter is 11008 x 4096."""
    from safetensors.numpy import save_file

    source = bench.make_adapter(work / "layer", "7b", 16, "float16", layers=1)
    weights = {}
    for name, (m, n) in bench.SHAPES["7b"][1].items():
        w, _, _ = module(m, n)
        weights[f"model.layers.0.{name}.weight"] = w.astype(np.float16)
    save_file(weights, work / "model.safetensors")
    argv = [str(BIN / "loratools"), "diagnose", str(source), "--base", str(work / "model.safetensors"), "-q"]
    found = bench.measure({"diagnose --base": argv}, 1)["diagnose --base"]
    largest = 11008 * 4096 * 4 / 2**20
    return {**found, "largest_parameter_fp32_mb": round(largest), "beyond_it_mb": round(found["peak_mb_max"] - largest)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--no-peft", action="store_true")
    parser.add_argument("--only", choices=["shapes", "without_base", "memory"])
    parser.add_argument("--note", default="")
    args = parser.parse_args()
    parts = {
        "shapes": lambda _: shapes(not args.no_peft),
        "without_base": lambda work: without_base(work, args.runs),
        "memory": memory,
    }
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
        chosen = {name: part(Path(folder)) for name, part in parts.items() if args.only in (None, name)}
    bench.write("diagnose", {**({"note": args.note} if args.note else {}), **chosen}, args.out)


if __name__ == "__main__":
    main()
