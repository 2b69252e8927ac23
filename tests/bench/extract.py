"""Extraction of one 4096 x 4096 matrix at rank 32, beside the dense SVD that peers use.

    python tests/bench/extract.py --out docs/bench/extract.json

The difference has singular values j^-0.5 over a floor, as full fine-tunes do: a slow decay, the hard case. Both use all
threads; ours includes forming the difference out of two bf16 tensors.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

spec = importlib.util.spec_from_file_location("_bench", Path(__file__).with_name("_bench.py"))
assert spec is not None
assert spec.loader is not None
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


def models(size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    import ml_dtypes

    rng = np.random.default_rng(0)
    w = (0.02 * rng.standard_normal((size, size))).astype(ml_dtypes.bfloat16)
    d = rng.standard_normal((size, size)).astype(np.float32) * (np.arange(1, size + 1) ** -0.5).astype(np.float32)
    d = d @ np.linalg.qr(rng.standard_normal((size, size)).astype(np.float32))[0]
    d *= np.float32(0.05 * np.linalg.norm(w.astype(np.float32)) / np.linalg.norm(d))
    return {"l.q.weight": w}, {"l.q.weight": (w.astype(np.float32) + d).astype(ml_dtypes.bfloat16)}


def one_matrix(size: int, rank: int, runs: int) -> dict[str, Any]:
    from loratools.ops.extract import extract

    base, tuned = models(size)
    d = tuned["l.q.weight"].astype(np.float32) - base["l.q.weight"].astype(np.float32)
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        done = extract(base, tuned, rank=rank, dtype="float32")
        seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    s = np.linalg.svd(d, full_matrices=False)[1]
    dense = time.perf_counter() - start
    ours = statistics.median(seconds[1:])
    error = float(np.linalg.norm(done["l.q.weight"].dense() - d) / np.linalg.norm(d))
    best = float(np.linalg.norm(s[rank:].astype(np.float64)) / np.linalg.norm(s.astype(np.float64)))
    return {
        "shape": f"{size} x {size}, rank {rank}, bf16",
        "loratools_s": [round(x, 3) for x in seconds[1:]],
        "dense_svd_s": round(dense, 2),
        "times_faster": round(dense / ours, 1),
        "error": error,
        "optimum": best,
        "excess_percent": round(100 * (error / best - 1), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    bench.write("extract", {"extract": one_matrix(4096, 32, args.runs)}, args.out)


if __name__ == "__main__":
    main()
