"""What the dispatcher costs where there is no GPU: one call, and its share of a whole squeeze.

    python tests/bench/dispatch.py --out docs/bench/dispatch.json

Measure an installed wheel. Whole processes with ``LORATOOLS_KERNELS`` auto and off take turns, compared by CPU time; as
their difference drowns in the noise, the share is counted: calls times the time of one over the squeeze's CPU time.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import statistics
import sys
import tempfile
import timeit
from pathlib import Path
from typing import Any

from loratools.linalg import factored, seeds
from loratools.ops import squeeze as _  # noqa: F401 - what a squeeze imports

spec = importlib.util.spec_from_file_location("_bench", Path(__file__).with_name("_bench.py"))
assert spec is not None
assert spec.loader is not None
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

BIN = Path(sys.executable).parent
CALLS = 100_000


def seconds_per_call() -> float:
    """Return what the wrapper adds to one call on NumPy arrays: the least of several runs."""
    like = seeds.uniform((0, 0), 2, 2)
    args = ([(like, like)], [1.0], [len])
    textbook = inspect.unwrap(factored.truncate_many)
    bare = factored.accelerable(lambda pairs, scales, chooses: None)
    same = inspect.unwrap(bare)
    assert textbook is not factored.truncate_many
    through, direct = (min(timeit.repeat(lambda f=f: f(*args), number=CALLS, repeat=7)) for f in (bare, same))
    return (through - direct) / CALLS


def processes(work: Path, runs: int) -> dict[str, Any]:
    """Time squeezes of a 7B-shaped adapter as whole processes, auto and off in turns."""
    source = bench.make_adapter(work / "7b", "7b", 64, "float16")
    layers, shapes = bench.SHAPES["7b"]
    tail = ["squeeze", str(source), "--rank", "8", "-o", str(work / "out"), "--overwrite"]
    commands = {mode: ["env", f"LORATOOLS_KERNELS={mode}", str(BIN / "loratools"), *tail] for mode in ("auto", "off")}
    found = bench.measure(commands, runs)
    cpu = {mode: statistics.median(rows["cpu_s"]) for mode, rows in found.items()}
    return {
        "calls": layers * len(shapes),
        "median_cpu_s": cpu,
        "cpu_auto_over_off": round(cpu["auto"] / cpu["off"], 4),
        "runs": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--runs", type=int, default=15)
    args = parser.parse_args()
    each = {"torch not loaded": seconds_per_call()}
    with tempfile.TemporaryDirectory() as folder:
        found = processes(Path(folder), args.runs)
    if importlib.util.find_spec("torch"):
        __import__("torch")
        each["torch loaded"] = seconds_per_call()
    share = {name: found["calls"] * value / found["median_cpu_s"]["off"] for name, value in each.items()}
    figures = {
        "seconds_per_call": {name: round(value, 9) for name, value in each.items()},
        "share_of_squeeze": {name: round(value, 6) for name, value in share.items()},
    }
    bench.write("dispatch", {**figures, **found}, args.out)


if __name__ == "__main__":
    main()
