"""Excess error of squeezes over the Eckart-Young optimum, judged by dense SVDs in float64, before the output cast.

    python tests/bench/accuracy.py --out docs/bench/accuracy.json

Made modules (gentle and hard spectra, among them a flat a with a steep b) in fp32, fp16, bf16, and every PEFT adapter
named by LORATOOLS_REAL_ADAPTERS. Excess = (|D - D'| - |D - D_opt|) / |D|, Frobenius.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import loratools as lt
from loratools.kinds.lowrank import LowRank
from loratools.linalg import factored
from loratools.linalg.namespace import down, to_numpy, up

spec = importlib.util.spec_from_file_location("_bench", Path(__file__).with_name("_bench.py"))
assert spec is not None
assert spec.loader is not None
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

RANKS = (1, 4, 8, 16)
SPECTRA = {
    "j^-1": lambda j: 1 / j,
    "j^-0.5": lambda j: j**-0.5,
    "10^(-j/4)": lambda j: 10 ** (-j / 4),
    "flat": lambda j: j**0.0,
}


def made(dtype: str) -> Iterator[tuple[str, LowRank]]:
    rng = np.random.default_rng(0)
    j = np.arange(1, 33)
    for name, law in SPECTRA.items():
        for m, n in ((768, 768), (1024, 300), (200, 900)):
            steep, flat = rng.standard_normal((m, 32)) * law(j), rng.standard_normal((32, n))
            q = np.linalg.qr(rng.standard_normal((32, 32)))[0]
            for how, b, a in (("steep b", steep @ q, q.T @ flat), ("steep a", steep, law(j)[:, None] * flat)):
                yield (
                    f"{name}, {how}",
                    LowRank(down(b.astype(np.float32), dtype), down(a.astype(np.float32), dtype), 2.0),
                )


def excess(u: LowRank, rank: int) -> tuple[float, str]:
    b, a = (to_numpy(up(t, "float64")) for t in (u.b, u.a))
    d = u.scale * b @ a
    s = np.linalg.svd(d, compute_uv=False)
    result = factored.truncate(u.b, u.a, lambda _: rank, scale=u.scale)
    error = np.linalg.norm(d - to_numpy(up(result.b, "float64")) @ to_numpy(up(result.a, "float64")))
    return float((error - np.sqrt((s[result.rank :] ** 2).sum())) / np.linalg.norm(d)), result.route


def summary(modules: Iterator[tuple[str, LowRank]]) -> dict[str, Any]:
    rows = [(*excess(u, k), name, k) for name, u in modules for k in RANKS if k < u.rank]
    worst = max(rows)
    return {
        "squeezes": len(rows),
        "worst_excess": worst[0],
        "worst_case": f"{worst[2]}, rank {worst[3]}",
        "routes": Counter(r[1] for r in rows),
    }


def real() -> dict[str, Any]:
    found = {}
    for folder in sorted(Path(os.environ.get("LORATOOLS_REAL_ADAPTERS", "/nonexistent")).glob("*")):
        if (folder / "adapter_model.safetensors").exists():
            adapter = lt.load(folder)
            found[folder.name] = summary((n, u) for n, u in adapter.items() if isinstance(u, LowRank))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    figures = {"made": {dtype: summary(made(dtype)) for dtype in ("float32", "float16", "bfloat16")}, "real": real()}
    bench.write("accuracy", figures, args.out)


if __name__ == "__main__":
    main()
