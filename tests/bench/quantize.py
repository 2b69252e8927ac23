"""Low-bit files: speed and size on a 7B-shaped adapter, error at equal true bytes on real ones, accuracy on digits.

    python tests/bench/quantize.py --out docs/bench/quantize.json --table docs/quantize-error.md

``seven_b``: quantize --bits 1, squeeze --rank 8 and dequantize as whole processes in turns (r = 64, fp16; ``--layers``
of 32), and decoding alone, in memory, to fp16 and fp32 (GB of output per second). ``real``: every adapter named by
LORATOOLS_REAL_ADAPTERS with a nonzero update, up to ``--modules`` of its modules, evenly spaced. A baseline quantises
them in its own way; its bytes are counted with all scales and zero points; then ours may use as many and no more.
Errors are relative, Frobenius, over all modules together.

* sign: sign times mean magnitude, groups of 128, of the balanced singular components;
* binary-N: Binary Adapters' rule applied afterwards, to the factors as they are;
* rtn-N: round to nearest, N bits, asymmetric, groups of 128 with fp16 scale and N-bit zero point, factors as they are;
* split-N@rho: LoRAQuant's split of the balanced components (N bits rtn for the smallest head with rho of the energy,
  sign for the rest, groups of 128, without its gradient steps).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

import loratools as lt
from loratools.core.adapter import Adapter, Meta
from loratools.kinds.binary import binary
from loratools.kinds.lowrank import LowRank, low_ranks
from loratools.kinds.packed import Packed, packed_sizes
from loratools.linalg import factored
from loratools.linalg.select import numerical_rank

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
GROUP = 128
Array = Any
Pair = tuple[Array, Array, int]  # b', a', true bytes


def loaded(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


bench = loaded("_bench", Path(__file__).with_name("_bench.py"))


def grouped(x: Array, f: Callable[[Array], Array]) -> Array:
    """Apply ``f`` to stretches of 128 entries along the last axis."""
    return np.concatenate([f(x[:, i : i + GROUP]) for i in range(0, x.shape[1], GROUP)], axis=1)


def count(n: int) -> int:
    return -(-n // GROUP)


def sign(x: Array) -> tuple[Array, int]:
    """Quantise rows by sign times mean magnitude; return them and their bytes."""
    out = grouped(x, lambda g: np.where(g >= 0, 1.0, -1.0) * np.abs(g).mean(axis=1, keepdims=True))
    return out, x.shape[0] * (-(-x.shape[1] // 8) + 2 * count(x.shape[1]))


def rtn(x: Array, bits: int) -> tuple[Array, int]:
    """Quantise rows to nearest of 2^bits even levels between the extremes; return them and their bytes."""

    def one(g: Array) -> Array:
        low, high = np.minimum(g.min(axis=1, keepdims=True), 0), np.maximum(g.max(axis=1, keepdims=True), 0)
        scale = ((high - low) / (2**bits - 1)).astype(np.float16).astype(np.float64)
        scale = np.where(scale == 0, 1.0, scale)
        zero = np.clip(np.round(-low / scale), 0, 2**bits - 1)
        return (np.clip(np.round(g / scale) + zero, 0, 2**bits - 1) - zero) * scale

    per_row = math.ceil(x.shape[1] * bits / 8) + count(x.shape[1]) * (2 + bits / 8)
    return grouped(x, one), math.ceil(x.shape[0] * per_row)


def of_rows(rule: Callable[[Array], tuple[Array, int]]) -> Callable[[LowRank], Pair]:
    """Apply a rule for rows to b^T and a of the factors as they are, the scale's root in each."""

    def apply(u: LowRank) -> Pair:
        b, a = (np.asarray(t, np.float64) for t in u.factors("float64"))
        root = abs(u.scale) ** 0.5
        (qb, one), (qa, two) = rule((b * root * np.sign(u.scale)).T), rule(a * root)
        return qb.T, qa, one + two

    return apply


def canonical(u: LowRank) -> tuple[Array, Array, Array]:
    found = factored.truncate(u.b, u.a, numerical_rank, scale=u.scale)
    return np.asarray(found.b, np.float64), np.asarray(found.a, np.float64), found.singular_values[: found.rank]


def signs(u: LowRank) -> Pair:
    b, a, _ = canonical(u)
    (qb, one), (qa, two) = sign(b.T), sign(a)
    return qb.T, qa, one + two


def medians(bits: int) -> Callable[[LowRank], Pair]:
    def apply(u: LowRank) -> Pair:
        found = binary(u, bits)
        low = found.unpacked()
        b, a = low.factors("float64")
        return np.asarray(b) * low.scale, np.asarray(a), found.b.nbytes + found.a.nbytes + 16

    return apply


def split(bits: int, share: float) -> Callable[[LowRank], Pair]:
    def apply(u: LowRank) -> Pair:
        b, a, s = canonical(u)
        energy = np.cumsum(s**2) / max(float((s**2).sum()), 1e-300)
        h = min(int((energy < share).sum()) + 1, len(s))
        parts = [[rtn(x[:h], bits), sign(x[h:])] if h < len(s) else [rtn(x[:h], bits)] for x in (b.T, a)]
        qb, qa = (np.concatenate([values for values, _ in side]) for side in parts)
        return qb.T, qa, sum(size for side in parts for _, size in side)

    return apply


BASELINES: dict[str, Callable[[LowRank], Pair]] = {
    "sign": signs,
    "binary-1": medians(1),
    "binary-2": medians(2),
    "binary-4": medians(4),
    "binary-8": medians(8),
    "rtn-2": of_rows(lambda x: rtn(x, 2)),
    "rtn-3": of_rows(lambda x: rtn(x, 3)),
    "rtn-4": of_rows(lambda x: rtn(x, 4)),
    "rtn-8": of_rows(lambda x: rtn(x, 8)),
    "split-2@0.8": split(2, 0.8),
    "split-3@0.9": split(3, 0.9),
}


def error(pairs: list[tuple[LowRank, Array, Array]]) -> float:
    wrong = square = 0.0
    for u, qb, qa in pairs:
        b, a = (np.asarray(t) for t in u.factors("float64"))
        square += factored.frobenius(b, a, scale=u.scale) ** 2
        wrong += factored.frobenius(np.concatenate([u.scale * b, -qb], axis=1), np.concatenate([a, qa])) ** 2
    return math.sqrt(wrong / square)


def compared(adapter: Adapter, name: str) -> dict[str, Any]:
    """Return the errors of one baseline and of ours at its bytes."""
    done = {n: BASELINES[name](u) for n, u in adapter.items()}  # type: ignore[arg-type]
    size = sum(bytes_ for _, _, bytes_ in done.values())
    theirs = error([(u, done[n][0], done[n][1]) for n, u in adapter.items()])  # type: ignore[misc]
    weights = sum(u.rank * sum(u.matrix_shape) for u in adapter.values())  # type: ignore[attr-defined]
    ours = lt.quantize(adapter, avg_bits=min(8 * (size + 0.01) / weights, 16.0))
    spent = sum(u.codes.nbytes + u.scales.nbytes for u in ours.values())  # type: ignore[attr-defined]
    assert spent <= size
    mine = error([(u, *(np.asarray(t) for t in ours[n].unpacked().factors("float64"))) for n, u in adapter.items()])  # type: ignore[attr-defined,misc]
    return {"bits": round(8 * size / weights, 3), "bytes": size, "bytes_ours": spent, "error": theirs, "ours": mine}


def sample(folder: Path, most: int) -> Adapter | None:
    """Return up to ``most`` nonzero low-rank modules of an adapter, evenly spaced; None where it has none."""
    try:
        adapter = lt.load(folder)
    except lt.LoratoolsError:
        return None
    found = {f"{n}[{i}]": u for n, up in adapter.items() for i, u in enumerate(low_ranks(up) or ())}
    alive = {n: u for n, u in found.items() if factored.frobenius(u.b, u.a, scale=u.scale) > 0}
    names = list(alive)[:: max(1, -(-len(alive) // most))]
    return Adapter({n: LowRank(*alive[n].factors(), alive[n].scale) for n in names}, Meta()) if names else None


def real(most: int, only: str | None) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for folder in sorted(Path(os.environ.get("LORATOOLS_REAL_ADAPTERS", "/nonexistent")).glob("*")):
        adapter = sample(folder, most) if folder.is_dir() and (only is None or only in folder.name) else None
        if adapter is not None:
            rows[folder.name] = {"modules": len(adapter), **{name: compared(adapter, name) for name in BASELINES}}
            print(
                folder.name,
                {n: round(r["ours"] / r["error"], 3) for n, r in rows[folder.name].items() if n in BASELINES},
                flush=True,
            )
    return together(rows)


def joined(folder: Path) -> dict[str, Any]:
    """Return the figures of runs adapter by adapter (``--only NAME --out FOLDER/NAME.json``) as one."""
    found = [json.loads(file.read_text())["real"]["adapters"] for file in sorted(folder.glob("*.json"))]
    return together({name: row for rows in found for name, row in rows.items()})


def together(rows: dict[str, Any]) -> dict[str, Any]:
    """Return the rows with the geometric mean and the worst of our error over every baseline's."""
    means = {name: math.exp(np.mean([math.log(r[name]["ours"] / r[name]["error"]) for r in rows.values()]))
             for name in BASELINES} if rows else {}  # fmt: skip
    worst = {name: max(r[name]["ours"] / r[name]["error"] for r in rows.values()) for name in BASELINES} if rows else {}
    return {"adapters": rows, "geometric_mean_ratio": means, "worst_ratio": worst}


def decoded(packed: Adapter, dtype: str, runs: int) -> dict[str, float]:
    """Return GB of output per second, the best and the median of several runs."""
    rates = []
    for _ in range(max(2 * runs, 5)):
        start = time.perf_counter()
        plain = lt.dequantize(packed, dtype=dtype)
        rates.append(plain.nbytes / (time.perf_counter() - start) / 1e9)
    return {"best": max(rates), "median": statistics.median(rates)}


def others(runs: int) -> dict[str, Any]:
    """Return the rates of other sizes and of groups: one layer, r = 64, random codes."""
    rng, (_, shapes) = np.random.default_rng(0), bench.SHAPES["7b"]
    found = {}
    for bits, group in ((1, 128), (2, 0), (3, 0), (4, 0), (4, 128), (8, 0), (8, 128)):
        made = {}
        for name, (m, n) in shapes.items():
            codes, scales = packed_sizes((bits, 64), m, n, group)
            drawn = rng.integers(0, 256, codes, np.uint8), rng.random(scales, np.float32).astype(np.float16)
            made[f"{name}.weight"] = Packed(*drawn, (bits, 64), (m, n), group)
        rates = {dtype: decoded(Adapter(made, Meta()), dtype, runs) for dtype in ("float16", "float32")}
        found[f"{bits} bit, group {group}"] = rates
    return found


def seven_b(work: Path, runs: int, layers: int) -> dict[str, Any]:
    source = bench.make_adapter(work / "7b", "7b", 64, "float16", layers=layers)
    before = (source / "adapter_model.safetensors").stat().st_size
    tool, one = str(BIN / "loratools"), work / "one.safetensors"
    commands = {
        "squeeze": [tool, "squeeze", str(source), "--rank", "8", "-o", str(work / "s"), "--overwrite"],
        "quantize": [tool, "quantize", str(source), "--bits", "1", "-o", str(one), "--overwrite"],
        "dequantize": [tool, "dequantize", str(one), "-o", str(work / "plain"), "--overwrite"],
    }
    found = bench.measure(commands, runs)
    rates = {dtype: decoded(lt.load(one), dtype, runs) for dtype in ("float16", "float32")}
    told = lt.quantize(lt.load(bench.make_adapter(work / "few", "7b", 64, "float16", layers=1)), bits=1).report
    return {
        "layers": layers,
        "bytes": before,
        "bytes_1bit": one.stat().st_size,
        "size_ratio": before / one.stat().st_size,
        "processes": found,
        "time_ratio": found["quantize"]["median_s"] / found["squeeze"]["median_s"],
        "decode_gb_per_s": rates,
        "decode_others": others(runs),
        "dequantize_gb_per_s": before / found["dequantize"]["median_s"] / 1e9,
        "relative_error_1bit": told.total["relative_error"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--modules", type=int, default=6)
    parser.add_argument("--only", help="adapters whose name contains this")
    parser.add_argument("--join", type=Path, metavar="DIR", help="put runs of --only together instead of running")
    parser.add_argument("--parts", default="seven_b,real", help="comma separated")
    args = parser.parse_args()
    figures: dict[str, Any] = {}
    if args.join is not None:
        bench.write("quantize", {"real": joined(args.join)}, args.out)
        return
    with tempfile.TemporaryDirectory() as work:
        if "seven_b" in args.parts:
            figures["seven_b"] = seven_b(Path(work), args.runs, args.layers)
        if "real" in args.parts:
            figures["real"] = real(args.modules, args.only)
    bench.write("quantize", figures, args.out)


if __name__ == "__main__":
    main()
