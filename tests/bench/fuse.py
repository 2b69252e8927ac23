"""Fusing beside PEFT's ``add_weighted_adapter`` and beside dense forms; memory; comparing 100 adapters.

    python tests/bench/fuse.py --out docs/bench/fuse.json

Rows: four 1.1B-shaped adapters (2 layers, r=32) by linear + truncation and by PEFT ``svd``; ``knots`` and ``tsv``
against the same methods on dense updates; four 7B-shaped adapters at r=64 (peak memory); 100 adapters of 3 MB compared.
Both sides of a ratio take turns; the shortest run of each counts, and seconds of the processor are given beside.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

import loratools as lt
from loratools.fusion.base import FUSIONS
from loratools.kinds.lowrank import LowRank

BIN = Path(sys.executable).parent


def loaded(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench = loaded("_bench", Path(__file__).with_name("_bench.py"))
Run = Callable[[], Any]


def made(work: Path, count: int, model: str, rank: int, dtype: str, *, layers: int | None) -> list[Path]:
    """Write ``count`` different adapters of one base."""
    return [bench.make_adapter(work / f"{model}-{i}", model, rank, dtype, layers=layers, seed=i) for i in range(count)]


def raced(ours: Run, theirs: Run, runs: int, *, times: int = 5) -> tuple[dict[str, Any], Any, Any]:
    """Run both in turns, ours ``times`` times a turn; return the seconds of all runs, ratios of the least, results."""
    seconds: dict[str, list[float]] = {"loratools_s": [], "loratools_cpu_s": [], "other_s": [], "other_cpu_s": []}
    for _ in range(runs):
        for _ in range(times):
            mine = timed(ours, seconds["loratools_s"], seconds["loratools_cpu_s"])
        other = timed(theirs, seconds["other_s"], seconds["other_cpu_s"])
    wall, cpu = (min(seconds[f"other{x}_s"]) / min(seconds[f"loratools{x}_s"]) for x in ("", "_cpu"))
    return {**seconds, "times_faster": round(wall, 1), "times_less_cpu": round(cpu, 1)}, mine, other


def timed(work: Run, wall: list[float], cpu: list[float]) -> Any:
    start, busy = time.perf_counter(), time.process_time()
    result = work()
    wall.append(round(time.perf_counter() - start, 4))
    cpu.append(round(time.process_time() - busy, 4))
    return result


def truncation(work: Path, runs: int, layers: int) -> dict[str, Any]:
    """Linear + truncation of four adapters, reading the files included, beside PEFT's svd in memory."""
    folders = made(work, 4, "1.1b", 32, "float32", layers=layers)
    exact = lt.fuse([lt.load(f) for f in folders], weights=[0.25] * 4)
    seconds, fused, factors = raced(
        lambda: lt.fuse([lt.load(f) for f in folders], weights=[0.25] * 4, rank=32), peft_svd(folders), runs
    )
    return {
        "shape": f"4 adapters, 1.1B, {layers} layers, r=32 -> 32, fp32; other = PEFT svd",
        **seconds,
        "error_loratools": distance({n: u.factors("float64") for n, u in fused.items()}, exact),
        "error_peft": distance(factors, exact),
    }


def distance(factors: dict[str, Any], exact: Any) -> float:
    """Return |fused - exact sum| / |exact sum| over all modules."""
    wrong = whole = 0.0
    for name, u in exact.items():
        b, a = (np.asarray(x, np.float64) for x in factors[name])
        left, right = u.factors("float64")
        d = u.scale * left @ right
        wrong, whole = wrong + np.sum((b @ a - d) ** 2), whole + np.sum(d**2)
    return float(np.sqrt(wrong / whole))


def peft_svd(folders: list[Path]) -> Run:
    """Return a run of add_weighted_adapter on bare linear layers of the same shapes; the model lies in memory."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.set_num_threads(os.cpu_count() or 1)
    sources = [lt.load(f) for f in folders]
    root = torch.nn.Module()
    names = {}
    for i, (name, u) in enumerate(sources[0].items()):
        layer = torch.nn.Linear(u.shape[1], u.shape[0], bias=False, device="meta")
        layer.weight = torch.nn.Parameter(torch.zeros(1).expand(u.shape), requires_grad=False)
        root.add_module(f"m{i}", layer)
        names[name] = f"m{i}"
    root.config = {"model_type": "custom"}
    config = LoraConfig(r=32, lora_alpha=64, target_modules=list(names.values()))
    model = get_peft_model(root, config, adapter_name="a0")
    for i in range(1, 4):
        model.add_adapter(f"a{i}", config)
    layers = {name: getattr(model.base_model.model, at) for name, at in names.items()}
    for i, source in enumerate(sources):
        for name, layer in layers.items():
            b, a = source[name].factors()
            layer.lora_B[f"a{i}"].weight.data = torch.from_numpy(b.copy())
            layer.lora_A[f"a{i}"].weight.data = torch.from_numpy(a.copy())

    def run() -> dict[str, Any]:
        if "fused" in model.peft_config:
            model.delete_adapter("fused")
        parts = [f"a{i}" for i in range(4)]
        model.base_model.add_weighted_adapter(parts, [0.25] * 4, "fused", combination_type="svd", svd_rank=32)
        return {
            name: tuple(x["fused"].weight.detach().numpy() for x in (layer.lora_B, layer.lora_A))
            for name, layer in layers.items()
        }

    return run


def dense_forms(runs: int) -> dict[str, Any]:
    """knots and tsv in factor space, one thread as in the command, against the published dense form on all cores."""
    rng = np.random.default_rng(0)
    pairs = [bench.factors(rng, 2048, 2048, 32) for _ in range(4)]
    deltas = [LowRank(b.astype(np.float32), a.astype(np.float32)) for b, a in pairs]
    found = {}
    for name, settings, by_hand in (("knots", {"rule": "sum"}, dense_knots), ("tsv", {}, dense_tsv)):

        def ours(run: Callable[..., Any] = FUSIONS[name].run, settings: Any = settings) -> Any:
            with threadpool_limits(1):
                return run(deltas, [1.0] * 4, **settings)

        seconds, mine, other = raced(ours, lambda f=by_hand: f([d.dense() for d in deltas]), runs)
        apart = float(np.linalg.norm(mine.dense() - other) / np.linalg.norm(other))
        found[name] = {**seconds, "relative_difference": apart}
    return {"shape": "4 updates of 2048 x 2048, r=32; other = dense form", **found}


def dense_knots(tasks: list[np.ndarray]) -> np.ndarray:
    u, s, vh = np.linalg.svd(np.concatenate(tasks, axis=1), full_matrices=False)
    return u @ sum(np.split(s[:, None] * vh, len(tasks), axis=1))


def dense_tsv(tasks: list[np.ndarray]) -> np.ndarray:
    us, ss, vs = [], [], []
    for x in tasks:
        u, s, vh = np.linalg.svd(x, full_matrices=False)
        us.append(u[:, :32])
        ss.append(s[:32])
        vs.append(vh[:32].T)
    left, right = (polar(np.concatenate(x, axis=1)) for x in (us, vs))
    return (left * np.concatenate(ss)) @ right.T


def polar(x: np.ndarray) -> np.ndarray:
    u, _, vh = np.linalg.svd(x, full_matrices=False)
    return u @ vh


def memory(work: Path) -> dict[str, Any]:
    """Peak memory of whole processes on four 7B-shaped adapters at r=64 in fp16."""
    folders = [str(f) for f in made(work, 4, "7b", 64, "float16", layers=None)]
    commands = {
        name: [str(BIN / "loratools"), "fuse", *folders, *words, "-o", str(work / f"out-{name}"), "--overwrite", "-q"]
        for name, words in (("exact", []), ("rank 64", ["--rank", "64"]))
    }
    found = bench.measure(commands, 1)
    sizes = {name: sum(f.stat().st_size for f in (work / f"out-{name}").iterdir()) for name in found}
    return {"shape": "4 adapters, 7B, r=64, fp16 (4 x 320 MB)", "runs": found, "output_bytes": sizes}


def hundred(work: Path) -> dict[str, Any]:
    """Whole process: compare 100 adapters of 3 MB."""
    folders = made(work, 100, "small", 32, "float16", layers=None)
    found = bench.measure({"compare": [str(BIN / "loratools"), "compare", *map(str, folders), "--json"]}, 1)
    return {"shape": "100 adapters of 3.1 MB (24 modules of 1024 x 1024, r=32)", **found["compare"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--only", choices=["truncation", "dense_forms", "memory", "hundred"])
    args = parser.parse_args()
    parts: dict[str, Callable[[Path], Any]] = {
        "truncation": lambda w: truncation(w, args.runs, args.layers),
        "dense_forms": lambda w: dense_forms(args.runs),
        "memory": memory,
        "hundred": hundred,
    }
    chosen = {}
    for name, part in parts.items():
        if args.only in (None, name):
            with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
                chosen[name] = part(Path(folder))
            chosen[name]["load_average"] = round(os.getloadavg()[0], 1)  # of a shared machine, own work included
    bench.write("fuse", chosen, args.out)


if __name__ == "__main__":
    main()
