"""Measure the table of block sizes on the GPU there is, row by row, and write it back.

    python tests/bench/gpu_tune.py                # rewrites kernels/blocks.json
    TRITON_INTERPRET=1 python tests/bench/gpu_tune.py --dry-run   # every line on tiny shapes, nothing is written

A row keeps the fastest of its candidates on the largest common shape it is for; candidates that do not compile or do
not fit are left out and counted.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch

spec = importlib.util.spec_from_file_location("_gpu", Path(__file__).with_name("_gpu.py"))
assert spec is not None
assert spec.loader is not None
gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)

from loratools.kernels import blocks, jacobi  # noqa: E402
from loratools.kernels.compose import composed  # noqa: E402
from loratools.kernels.gram import grams  # noqa: E402
from loratools.kernels.products import Matrices  # noqa: E402
from loratools.kernels.row_norms import direct  # noqa: E402
from loratools.kernels.row_norms_shared import shared_terms  # noqa: E402
from loratools.kernels.thin import thin  # noqa: E402

Blocks = dict[str, int]
Make = Callable[[Blocks], Callable[[], Any]]
WIDTH = 26  # columns of a sketch: rank 16 and oversampling 10
CANDIDATES: dict[str, dict[str, list[int]]] = {
    "row_norms": {
        "BM": [64, 128], "BN": [64, 128, 256], "BK": [32, 64], "SPLITS": [4, 8, 16, 32], "warps": [4, 8],
        "stages": [3, 4], "registers": [0, 128],
    },
    "row_norms_shared": {"BM": [64, 128], "BR": [64, 128], "BK": [64, 128], "warps": [4, 8], "stages": [2, 3, 4]},
    "compose": {"BM": [64, 128], "BN": [64, 128], "BK": [32, 64], "warps": [4, 8], "stages": [2, 3]},
    "gram": {"BK": [16, 32, 64], "STRETCH": [1024, 2048, 4096], "warps": [4, 8], "stages": [2, 3, 4]},
    "thin": {"BM": [32, 64, 128], "STRETCH": [512, 1024, 2048], "warps": [4, 8], "stages": [2, 3, 4]},
    "small_svd": {"jacobi": [0, 1], "warps": [2, 4, 8]},
    "sketch": {
        "fused": [0, 1], "BM": [64, 128, 256], "BK": [32, 64, 128], "SPLITS": [1], "warps": [4, 8], "stages": [2, 3, 4],
    },
    "times": {"BM": [64, 128], "BK": [32, 64, 128], "SPLITS": [1, 4, 8], "warps": [4, 8], "stages": [2, 3, 4, 5]},
    "turned": {"BM": [64, 128], "BK": [32, 64, 128], "SPLITS": [1, 4, 8], "warps": [4, 8], "stages": [2, 3, 4, 5]},
}  # fmt: skip


def maker(machine: Any, kernel: str, upto: dict[str, int]) -> Make:
    """Return blocks -> a call of the kernel on the shape that stands for a row of the table."""
    dtype = torch.bfloat16 if upto.get("itemsize") == 2 else torch.float32
    m, n = (40, 48) if machine.tiny else (4096, upto.get("n", 8192) // 2048 * 2048)
    rank = 4 if machine.tiny else upto.get("rank", 384 if kernel == "row_norms" else 128)
    if kernel in ("row_norms", "compose", "row_norms_shared"):
        w, b, a = (machine.normal(*shape, dtype=dtype) for shape in ((m, n), (m, rank), (rank, n)))
        gain = torch.ones(m, device=machine.device)
        return {
            "row_norms": lambda s: lambda: direct(w, b, a, 0.5, blocks=s),
            "compose": lambda s: lambda: composed(w, b, a, gain, 0.5, blocks=s),
            "row_norms_shared": lambda s: lambda: shared_terms(w, [b] * 4, [a] * 4, blocks=s),
        }[kernel]
    if kernel in ("gram", "thin"):
        count = 2 if machine.tiny else 32
        xs = [machine.normal(*((m, rank) if i % 2 else (rank, m)), dtype=dtype) for i in range(count)]
        wide, cores = [i % 2 == 0 for i in range(count)], machine.normal(count, rank, 8, dtype=torch.float32)
        if kernel == "gram":
            return lambda s: lambda: grams(xs, wide=wide, blocks=s)
        return lambda s: lambda: thin(xs, cores, [8] * count, wide=wide, blocks=s)
    if kernel == "small_svd":
        order = 3 if machine.tiny else upto.get("order", 128)
        x = machine.normal(2 if machine.tiny else 224, order, order, dtype=torch.float32).double()
        return lambda s: lambda: jacobi.svd(x @ x.mT, blocks=s)
    count = 2 if machine.tiny else upto.get("batch", 32)
    ds = [machine.normal(m, m, dtype=dtype) for _ in range(count)]
    batch = Matrices(ds, None if upto.get("minus") == 0 else ds[::-1])
    keys, x = [(0, i) for i in range(count)], machine.normal(count, m, WIDTH, dtype=torch.float32)
    return {
        "sketch": lambda s: lambda: batch.sketch(keys, WIDTH, blocks=s),
        "times": lambda s: lambda: batch.times(x, blocks=s),
        "turned": lambda s: lambda: batch.turned_times(x, blocks=s),
    }[kernel]


def candidates(machine: Any, kernel: str, now: Blocks, most: int) -> Iterator[Blocks]:
    """Yield what to try: today's blocks first. ``most``: rows of a Gram tile that its error bound allows."""
    yield now
    names, values = zip(*CANDIDATES[kernel].items(), strict=True)
    every = [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*values)]
    exact = [s for s in every if kernel != "gram" or s["BK"] <= most]
    yield from (exact[:1] if machine.tiny else exact)


def fastest(machine: Any, kernel: str, row: dict[str, Any]) -> tuple[Blocks, float, int]:
    """Return the fastest blocks for a row, their seconds, and how many candidates did not run."""
    make, best, least, failed = maker(machine, kernel, row["upto"]), dict(row["blocks"]), float("inf"), 0
    for tried in candidates(machine, kernel, best, 64 if row["upto"].get("itemsize") == 2 else 16):
        try:
            took = machine.seconds([make(tried)], graph=False, repeats=10)
        except Exception as error:  # Triton: out of registers or shared memory, or a shape it cannot tile
            if machine.tiny:
                raise
            failed += 1
            print(f"{kernel} {tried}: {type(error).__name__}", file=sys.stderr)
            continue
        if took < least:
            best, least = tried, took
    return best, least, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes under the interpreter; nothing is written")
    parser.add_argument("--only", choices=list(CANDIDATES))
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        raise SystemExit("no GPU: run with --dry-run")
    machine = gpu.Machine(tiny=args.dry_run)
    loaded = json.loads(blocks.FILE.read_text())
    for kernel, rows in loaded["kernels"].items():
        for row in rows if args.only in (None, kernel) else []:
            row["blocks"], took, failed = fastest(machine, kernel, row)
            print(f"{kernel} {row['upto']}: {row['blocks']} {gpu.milliseconds(took)} ms, {failed} did not run")
    loaded["measured"] = machine.describe()
    if not args.dry_run:
        blocks.FILE.write_text(text(loaded))


def text(loaded: dict[str, Any]) -> str:
    """Return the table as its file has it: one row a line."""
    kernels = [
        f'  "{kernel}": [\n' + ",\n".join(f"   {json.dumps(row)}" for row in rows) + "\n  ]"
        for kernel, rows in loaded["kernels"].items()
    ]
    return (
        '{\n "measured": ' + json.dumps(loaded["measured"]) + ',\n "kernels": {\n' + ",\n".join(kernels) + "\n }\n}\n"
    )


if __name__ == "__main__":
    main()
