"""Measure the table of block sizes on the GPU there is, row by row, and write it back.

    python tests/bench/gpu_tune.py                # rewrites kernels/blocks.json
    TRITON_INTERPRET=1 python tests/bench/gpu_tune.py --dry-run   # every line on tiny shapes, nothing is written

A row keeps the fastest of its candidates on the largest common shape it is for; candidates that do not compile or do
not fit are left out and counted. First all are compiled, by as many processes as there are cores, into Triton's cache;
then they are timed, one at a time, with cold L2. The table is written after every row; rows that there was no time for
keep their blocks, and are named.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
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
if __name__ == "__main__":
    gpu.prepare()

from loratools.kernels import blocks, jacobi  # noqa: E402
from loratools.kernels.compose import composed  # noqa: E402
from loratools.kernels.gram import grams  # noqa: E402
from loratools.kernels.products import Matrices  # noqa: E402
from loratools.kernels.row_norms import direct  # noqa: E402
from loratools.kernels.row_norms_shared import shared_terms  # noqa: E402
from loratools.kernels.thin import thin  # noqa: E402

Blocks = dict[str, int]
Calls = Sequence[Callable[[], Any]]
Make = Callable[[Blocks], Calls]
WIDTH = 26  # columns of a sketch: rank 16 and oversampling 10

TILES = {"BM": [64, 128, 256], "BK": [64, 128], "warps": [8], "stages": [3, 4]}
CANDIDATES: dict[str, list[dict[str, list[int]]]] = {
    "row_norms": [
        {"BM": [128], "BN": [256], "BK": [64], "SPLITS": [4, 16], "EARLY": [0, 1], "warps": [8], "stages": [3],
         "registers": [0]},
        {"BM": [256], "BN": [128], "BK": [64], "SPLITS": [8, 16], "EARLY": [1], "warps": [8], "stages": [3],
         "registers": [0]},
        {"BM": [128], "BN": [128], "BK": [64], "SPLITS": [8, 16], "EARLY": [0, 1], "warps": [8], "stages": [2, 3],
         "registers": [128]},
        {"BM": [64], "BN": [64, 128], "BK": [64], "SPLITS": [8, 16], "EARLY": [1], "warps": [4], "stages": [2, 3],
         "registers": [0]},
        {"BM": [128], "BN": [64], "BK": [64], "SPLITS": [8, 16], "EARLY": [1], "warps": [4], "stages": [2, 3],
         "registers": [0]},
    ],
    "row_norms_shared": [{"BM": [64, 128], "BR": [64, 128], "BK": [64, 128], "warps": [4, 8], "stages": [3]}],
    "compose": [{"BM": [64, 128], "BN": [128], "BK": [64], "warps": [4, 8], "stages": [2, 3]}],
    "gram": [{"BK": [16, 64], "STRETCH": [1024, 2048, 4096], "warps": [4, 8], "stages": [3, 4]}],
    "thin": [{"BM": [64, 128], "STRETCH": [512, 1024], "warps": [4], "stages": [2, 3]}],
    "small_svd": [{"jacobi": [0], "warps": [4]}, {"jacobi": [1], "warps": [2, 4, 8]}],
    "sketch": [{"fused": [0, 1], "SPLITS": [1], **TILES}],
    "times": [{"SPLITS": [1, 8], **TILES}],
    "turned": [{"SPLITS": [1, 8], **TILES}],
}  # fmt: skip


def maker(machine: Any, kernel: str, upto: dict[str, int]) -> Make:
    """Return blocks -> calls of the kernel, over buffers that take turns, on the shape that stands for a row."""
    dtype = torch.bfloat16 if upto.get("itemsize") == 2 else torch.float32
    if kernel in ("row_norms", "compose", "row_norms_shared"):
        return _on_a_base(machine, kernel, dtype, 64 if upto.get("rank") == 64 else 384)
    rank = 4 if machine.tiny else upto.get("rank", 128)
    size = 40 if machine.tiny else 4096
    if kernel in ("gram", "thin"):
        count = 2 if machine.tiny else 256  # together larger than L2
        xs = [machine.normal(*((size, rank) if i % 2 else (rank, size)), dtype=dtype) for i in range(count)]
        wide, cores = [i % 2 == 0 for i in range(count)], machine.normal(count, rank, 8, dtype=torch.float32)
        if kernel == "gram":
            return lambda s: [lambda: grams(xs, wide=wide, blocks=s)]
        return lambda s: [lambda: thin(xs, cores, [8] * count, wide=wide, blocks=s)]
    if kernel == "small_svd":
        order = 3 if machine.tiny else upto.get("order", 128)
        x = machine.normal(2 if machine.tiny else 224, order, order, dtype=torch.float32).double()
        return lambda s: [lambda: jacobi.svd(x @ x.mT, blocks=s)]
    count = 2 if machine.tiny else upto.get("batch", 32)
    ds = [machine.normal(size, size, dtype=dtype) for _ in range(count)]
    batch = Matrices(ds, None if upto.get("minus") == 0 else ds[::-1])
    keys, x = [(0, i) for i in range(count)], machine.normal(count, size, WIDTH, dtype=torch.float32)
    return {
        "sketch": lambda s: [lambda: batch.sketch(keys, WIDTH, blocks=s)],
        "times": lambda s: [lambda: batch.times(x, blocks=s)],
        "turned": lambda s: [lambda: batch.turned_times(x, blocks=s)],
    }[kernel]


def _on_a_base(machine: Any, kernel: str, dtype: torch.dtype, rank: int) -> Make:
    """Row norms and compose: 4096 x 4096 for ranks that wait for W, 8192 x 8192 for those that do not."""
    size = 4096 if rank <= 64 else 8192
    m, n, rank = (40, 48, 4) if machine.tiny else (size, size, rank)
    rank = min(rank, 128) if kernel == "row_norms_shared" else rank
    sets = [
        tuple(
            machine.normal(*shape, dtype=part)
            for shape, part in (((m, n), dtype), ((m, rank), torch.bfloat16), ((rank, n), torch.bfloat16))
        )
        for _ in range(machine.copies(m * n * dtype.itemsize))
    ]
    gain = torch.ones(m, device=machine.device)
    run: dict[str, Callable[..., Any]] = {
        "row_norms": lambda s, w, b, a: direct(w, b, a, 0.5, blocks=s),
        "compose": lambda s, w, b, a: composed(w, b, a, gain, 0.5, blocks=s),
        "row_norms_shared": lambda s, w, b, a: shared_terms(w, [b] * 4, [a] * 4, blocks=s),
    }
    return lambda s: [lambda given=given: run[kernel](s, *given) for given in sets]


def candidates(machine: Any, kernel: str, row: dict[str, Any]) -> Iterator[Blocks]:
    """Yield what to try: today's blocks first. Gram tiles have as many rows as their error bound allows."""
    upto = row["upto"]
    most = 64 if upto.get("itemsize") == 2 else 16
    yield row["blocks"]
    for group in CANDIDATES[kernel]:
        every = [dict(zip(group, chosen, strict=True)) for chosen in itertools.product(*group.values())]
        fine = [s for s in every if kernel != "gram" or s["BK"] <= most]
        fine = [s for s in fine if kernel not in ("times", "turned") or (s["SPLITS"] > 1) == ("batch" in upto)]
        yield from (fine[:1] if machine.tiny else fine)


def fastest(machine: Any, kernel: str, row: dict[str, Any], clock: Any) -> tuple[Blocks, float, int]:
    """Return the fastest blocks for a row, their seconds, and how many candidates did not run."""
    make, best, least, failed = maker(machine, kernel, row["upto"]), dict(row["blocks"]), float("inf"), 0
    for tried in candidates(machine, kernel, row):
        if clock.left < 0:
            break
        try:
            with redirect_stdout(io.StringIO()):  # Triton prints whole programs where ptxas refuses one
                took = machine.seconds(make(tried), graph=False, repeats=5)
        except Exception as error:  # Triton: out of registers or shared memory, or a shape it cannot tile
            if machine.tiny:
                raise
            failed += 1
            print(f"{kernel} {tried}: {type(error).__name__}", file=sys.stderr)
            continue
        if took < least:
            best, least = tried, took
    return best, least, failed


def rows_of(loaded: dict[str, Any], only: str | None) -> list[tuple[str, dict[str, Any]]]:
    return [(kernel, row) for kernel, rows in loaded["kernels"].items() for row in rows if only in (None, kernel)]


def warm(machine: Any, rows: Sequence[tuple[str, dict[str, Any]]], share: int, shares: int) -> None:
    """Compile one share of all candidates into Triton's cache by calling each once; what fails, fails again later."""
    place = 0
    for kernel, row in rows:
        mine = []
        for tried in candidates(machine, kernel, row):
            mine += [tried] if place % shares == share else []
            place += 1
        if mine:
            make = maker(machine, kernel, row["upto"])
            for tried in mine:
                with suppress(Exception), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                    make(tried)[0]()


def warmed(arguments: Sequence[str], clock: Any) -> None:
    """Let as many processes as there are cores compile, for at most half the time that is left."""
    shares = max(1, (os.cpu_count() or 1) - 1)
    argv = [sys.executable, __file__, *arguments]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    working = [subprocess.Popen([*argv, "--warm", str(i), str(shares)], **quiet) for i in range(shares)]
    end = gpu.Clock(clock.left / 2)
    for process in working:
        try:
            process.wait(max(0.1, end.left))
        except subprocess.TimeoutExpired:
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes under the interpreter; nothing is written")
    parser.add_argument("--only", choices=list(CANDIDATES))
    parser.add_argument("--out", type=Path, default=blocks.FILE, help="where the table goes (default: its own place)")
    parser.add_argument("--limit", type=float, default=500.0, help="seconds that it may take")
    parser.add_argument("--warm", type=int, nargs=2, metavar=("I", "N"), help="compile share I of N, time nothing")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        raise SystemExit("no GPU: run with --dry-run")
    machine, clock = gpu.Machine(tiny=args.dry_run), gpu.Clock(args.limit)
    loaded = json.loads(blocks.FILE.read_text())
    rows = rows_of(loaded, args.only)
    if args.warm:
        warm(machine, rows, *args.warm)
        return
    if machine.gpu:
        warmed([] if args.only is None else ["--only", args.only], clock)
    loaded["measured"] = {**machine.describe(), "rows": 0}
    for done, (kernel, row) in enumerate(rows, 1):
        if clock.left < 5:
            print(f"no time left: {kernel} {row['upto']} keeps its blocks", flush=True)
            continue
        row["blocks"], took, failed = fastest(machine, kernel, row, clock)
        loaded["measured"]["rows"] = done
        print(f"{kernel} {row['upto']}: {row['blocks']} {gpu.milliseconds(took)} ms, {failed} did not run", flush=True)
        if not args.dry_run:
            args.out.write_text(text(loaded))


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
