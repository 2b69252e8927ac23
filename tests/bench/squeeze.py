"""Squeeze as a whole process, beside a peer, the physical floor and the dense route.

    python tests/bench/squeeze.py --out docs/bench/squeeze.json

Measure an installed wheel: an editable install may compile its sources at every start.

Rows: 7B-shaped r=64 -> 8 in fp16 (320 MB); memory on 2 GiB; a 3 MB adapter against ``import numpy``; ``--help``. The
floor reads every byte and writes as many as the result has, with fsync as the program does, without mathematics; the
bare arithmetic does the same NumPy calls in two threads, without formats, checks and reports.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

spec = importlib.util.spec_from_file_location("_bench", Path(__file__).with_name("_bench.py"))
assert spec is not None
assert spec.loader is not None
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

BIN = Path(sys.executable).parent
FLOOR = """
import os, sys
import numpy as np
size, out = int(sys.argv[2]), sys.argv[3]
buffer = np.empty(1 << 22, np.uint8)
with open(sys.argv[1], "rb", buffering=0) as file:
    while file.readinto(buffer): pass
with open(out, "wb", buffering=0) as file:
    for start in range(0, size, 1 << 22): file.write(buffer[: size - start])
    os.fsync(file.fileno())
"""

BARE = """
import json, os, sys, threading
os.environ["OPENBLAS_NUM_THREADS"] = "1"
import numpy as np
source, out = os.open(sys.argv[1], os.O_RDONLY), sys.argv[2]
length = int.from_bytes(os.pread(source, 8, 0), "little")
header = json.loads(os.pread(source, length, 8))
header.pop("__metadata__", None)
paths = [key.removesuffix(".lora_A.weight") for key in header if key.endswith(".lora_A.weight")]
table = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
local, lock, todo, done = threading.local(), threading.Lock(), iter(range(len(paths))), [None] * len(paths)
def wide(key, i):
    start, stop = header[key]["data_offsets"]
    raw = local.raw[: stop - start]
    os.preadv(source, [raw], 8 + length + start)
    x = local.wide[i][: raw.size // 2]
    for at in range(0, x.size, 1 << 16):
        np.take(table, raw.view(np.uint16)[at : at + (1 << 16)], out=x[at : at + (1 << 16)], mode="wrap")
    return x.reshape(header[key]["shape"])
def one(path):
    a, b = wide(path + ".lora_A.weight", 0), wide(path + ".lora_B.weight", 1)
    ga = sum((x @ x.T).astype(np.float64) for x in (a[:, i : i + 2048] for i in range(0, a.shape[1], 2048)))
    gb = sum((x.T @ x).astype(np.float64) for x in (b[i : i + 2048] for i in range(0, b.shape[0], 2048)))
    root = np.linalg.cholesky(ga)
    energies, v = np.linalg.eigh(root.T @ gb @ root)
    s, lv = np.sqrt(energies[: -9 : -1]), root @ v[:, : -9 : -1]
    tall, flat = (lv * s**-0.5).astype(np.float32), ((lv * s**-1.5).T @ gb).astype(np.float32)
    return (b @ tall).astype(np.float16), (flat @ a).astype(np.float16)
def work():
    local.raw, local.wide = np.empty(1 << 22, np.uint8), [np.empty(1 << 20, np.float32) for _ in "ab"]
    while True:
        with lock: i = next(todo, None)
        if i is None: return
        done[i] = one(paths[i])
helper = threading.Thread(target=work)
helper.start(); work(); helper.join()
with open(out, "wb", buffering=0) as file:
    for pair in done:
        for x in pair: file.write(x)
    os.fsync(file.fileno())
"""
"""The arithmetic of the squeeze alone: no format, no check that a result may be trusted, no report."""


def bare(source: Path, out: Path) -> list[str]:
    return [sys.executable, "-c", BARE, str(source / "adapter_model.safetensors"), str(out)]


def squeeze(source: Path, out: Path, rank: int) -> list[str]:
    return [str(BIN / "loratools"), "squeeze", str(source), "--rank", str(rank), "-o", str(out), "--overwrite"]


def floor(source: Path, size: int, out: Path) -> list[str]:
    return [sys.executable, "-c", FLOOR, str(source / "adapter_model.safetensors"), str(size), str(out)]


def seven_b(work: Path, runs: int) -> dict[str, Any]:
    source = bench.make_adapter(work / "7b", "7b", 64, "float16")
    size = (source / "adapter_model.safetensors").stat().st_size // 8
    commands = {
        "loratools": squeeze(source, work / "out", 8),
        "floor": floor(source, size, work / "floor"),
        "bare arithmetic": bare(source, work / "bare"),
    }
    peer = shutil.which("gradience")  # may live in another environment
    if peer:
        commands["gradience"] = [
            peer,
            "truncate",
            "--peft-dir",
            str(source),
            "--rank",
            "8",
            "--out-dir",
            str(work / "peer"),
        ]
    found = bench.measure(commands, runs)
    ratio = {name: round(rows["median_s"] / found["loratools"]["median_s"], 2) for name, rows in found.items()}
    dense = dense_layer()
    return {
        "shape": "7B, r=64 -> 8, fp16, 320 MB",
        "fsync": "on in loratools and in the floor",
        "runs": found,
        "times_slower_than_loratools": ratio,
        "dense_svd_s_one_layer": dense,
        "dense_svd_times_slower_extrapolated_to_32_layers": round(32 * dense / found["loratools"]["median_s"]),
    }


def dense_layer() -> float:
    """Seconds for thin SVDs of one layer's seven dense updates, one of each shape measured, all cores."""
    rng = np.random.default_rng(0)
    total = 0.0
    shapes = list(bench.SHAPES["7b"][1].values())
    for shape in dict.fromkeys(shapes):
        b, a = bench.factors(rng, *shape, 64)
        dense = (b @ a).astype(np.float32)
        start = time.perf_counter()
        np.linalg.svd(dense, full_matrices=False)
        total += (time.perf_counter() - start) * shapes.count(shape)
    return round(total, 2)


def memory(work: Path) -> dict[str, Any]:
    """Peak memory on 2 GiB of input (7B shapes at r=64 in fp32 with more layers), one run."""
    source = bench.make_adapter(work / "big", "7b", 64, "float32", layers=108)
    size = (source / "adapter_model.safetensors").stat().st_size
    found = bench.measure({"loratools": squeeze(source, work / "out-big", 1)}, 1)
    out = (work / "out-big" / "adapter_model.safetensors").stat().st_size
    return {"input_bytes": size, "output_bytes": out, **found["loratools"]}


def small(work: Path, runs: int) -> dict[str, Any]:
    source = bench.make_adapter(work / "small", "small", 32, "float16")
    commands = {
        "loratools squeeze, 3 MB": squeeze(source, work / "out-small", 8),
        "import numpy": [sys.executable, "-c", "import numpy"],
        "loratools --help": [str(BIN / "loratools"), "--help"],
    }
    found = bench.measure(commands, runs)
    size = (source / "adapter_model.safetensors").stat().st_size
    names = list(commands)
    return {
        "bytes": size,
        "runs": found,
        "squeeze_over_import_numpy": round(found[names[0]]["median_s"] / found[names[1]]["median_s"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", choices=["7b", "memory", "small"])
    args = parser.parse_args()
    parts = {"7b": lambda w: seven_b(w, args.runs), "memory": memory, "small": lambda w: small(w, 4 * args.runs)}
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
        chosen = {name: part(Path(folder)) for name, part in parts.items() if args.only in (None, name)}
    bench.write("squeeze", chosen, args.out)


if __name__ == "__main__":
    main()
