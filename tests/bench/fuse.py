"""Fusing beside PEFT's ``add_weighted_adapter`` and beside dense forms; memory; comparing 100 adapters; accuracies.

    python tests/bench/fuse.py --out docs/bench/fuse.json

Rows: four 1.1B-shaped adapters (2 layers, r=32) by linear + truncation and by PEFT ``svd``, ``ties_svd``; ``knots`` and
``tsv`` against the same methods on dense updates; four 7B-shaped adapters at r=64 (peak memory); 100 adapters of 3 MB
compared; three adapters of disjoint digit groups fused by every method (accuracy of the fixture's model).
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

import loratools as lt
from loratools.fusion.base import FUSIONS

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SIZES = (0.2, 1 / 3, 0.5, 0.7, 1.0, 1.4)
GROUPS = ("56", "78", "90")


def loaded(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench = loaded("_bench", Path(__file__).with_name("_bench.py"))


def made(work: Path, count: int, model: str, rank: int, dtype: str, *, layers: int | None) -> list[Path]:
    """Write ``count`` different adapters of one base."""
    return [bench.make_adapter(work / f"{model}-{i}", model, rank, dtype, layers=layers, seed=i) for i in range(count)]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def best(work: Callable[[], Any], runs: int) -> tuple[float, Any]:
    """Return the shortest of several runs, and the last result."""
    found = [timed(work) for _ in range(runs)]
    return min(seconds for seconds, _ in found), found[-1][1]


def truncation(work: Path, runs: int, layers: int) -> dict[str, Any]:
    """Linear + truncation of four adapters, reading the files included, beside PEFT's svd and ties_svd in memory."""
    folders = made(work, 4, "1.1b", 32, "float32", layers=layers)
    ours, fused = best(lambda: lt.fuse([lt.load(f) for f in folders], weights=[0.25] * 4, rank=32), runs)
    ties, _ = best(lambda: lt.fuse([lt.load(f) for f in folders], method="ties", weights=[0.25] * 4, rank=32), 1)
    exact = lt.fuse([lt.load(f) for f in folders], weights=[0.25] * 4)
    peft = {kind: peft_fused(folders, kind) for kind in ("svd", "ties_svd")}
    theirs, factors = peft["svd"]
    return {
        "shape": f"4 adapters, 1.1B, {layers} layers, r=32 -> 32, fp32",
        "loratools_linear_s": round(ours, 4),
        "peft_svd_s": round(theirs, 2),
        "times_faster": round(theirs / ours),
        "error_loratools": distance({n: u.factors("float64") for n, u in fused.items()}, exact),
        "error_peft": distance(factors, exact),
        "loratools_ties_s": round(ties, 2),
        "peft_ties_svd_s": round(peft["ties_svd"][0], 2),
        "ties_times_faster": round(peft["ties_svd"][0] / ties, 1),
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


def peft_fused(folders: list[Path], kind: str) -> tuple[float, dict[str, Any]]:
    """Run PEFT's add_weighted_adapter on bare linear layers of the same shapes; its model lies in memory already."""
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
    for i, source in enumerate(sources):
        for name, at in names.items():
            layer = getattr(model.base_model.model, at)
            b, a = source[name].factors()
            layer.lora_B[f"a{i}"].weight.data = torch.from_numpy(b.copy())
            layer.lora_A[f"a{i}"].weight.data = torch.from_numpy(a.copy())
    options = {"density": 0.2} if "ties" in kind else {}
    seconds, _ = timed(
        lambda: model.base_model.add_weighted_adapter(
            [f"a{i}" for i in range(4)], [0.25] * 4, "fused", combination_type=kind, svd_rank=32, **options
        )
    )
    layers = {name: getattr(model.base_model.model, at) for name, at in names.items()}
    return seconds, {
        name: (x.lora_B["fused"].weight.detach().numpy(), x.lora_A["fused"].weight.detach().numpy())
        for name, x in layers.items()
    }


def dense_forms(runs: int) -> dict[str, Any]:
    """knots and tsv in factor space against the published dense form, on one 1.1B MLP module of four adapters."""
    rng = np.random.default_rng(0)
    shape = (2048, 2048)
    pairs = [bench.factors(rng, *shape, 32) for _ in range(4)]
    from loratools.kinds.lowrank import LowRank

    deltas = [LowRank(b.astype(np.float32), a.astype(np.float32)) for b, a in pairs]
    found = {}
    for name, settings, by_hand in (("knots", {"rule": "sum"}, dense_knots), ("tsv", {}, dense_tsv)):
        ours, result = best(lambda m=FUSIONS[name], s=settings: m.run(deltas, [1.0] * 4, **s), runs)
        theirs, other = timed(lambda f=by_hand: f([d.dense() for d in deltas]))
        apart = float(np.linalg.norm(result.dense() - other) / np.linalg.norm(other))
        found[name] = {
            "loratools_s": round(ours, 4), "dense_s": round(theirs, 2), "times_faster": round(theirs / ours, 1),
            "relative_difference": apart,
        }  # fmt: skip
    return {"shape": "4 updates of 2048 x 2048, r=32", **found}


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


def accuracy() -> dict[str, Any]:
    """Fuse three adapters of disjoint digit groups by every method; the common weight is chosen on training images."""
    import torch

    digits = loaded("digits", ROOT / "fixtures" / "digits.py")
    torch.set_num_threads(1)
    adapters = [lt.load(digits.DIGITS / f"group-{g}") for g in GROUPS]
    model = digits.load_base()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def put(adapter: Any) -> None:
        added = {n: torch.from_numpy(np.asarray(u.dense(), np.float32)) for n, u in adapter.items()}
        model.load_state_dict({n: w + added[n] if n in added else w for n, w in before.items()})

    def share(which: str, split: str = "test") -> float:
        pixels, labels = digits.images(which, split)
        return float((digits._logits(model, pixels).argmax(-1) == labels).double().mean())

    def tested() -> dict[str, float]:
        return {which: round(share(which), 4) for which in (*GROUPS, "".join(GROUPS))}

    stats = []
    for group, adapter in zip(GROUPS, adapters, strict=True):
        put(adapter)
        stats.append(
            input_grams(model, list(adapter), lambda g=group: digits._logits(model, digits.images(g, "train").pixels))
        )
    alone = {}
    for group, adapter in zip(GROUPS, adapters, strict=True):
        put(adapter)
        alone[f"group-{group} alone"] = tested()
    rows = {}
    for name, method in FUSIONS.items():
        if method.most == 2:
            continue
        tries = []
        for size in SIZES:
            more = {"stats": stats} if "statistics" in method.handed_over else {}
            put(lt.fuse(adapters, method=name, weights=[size] * 3, **more))
            tries.append((share("".join(GROUPS), "train"), size, tested()))
        chosen = max(tries, key=lambda t: t[0])
        at_one = next(t for t in tries if t[1] == 1.0)
        rows[name] = {"weight": round(chosen[1], 3), **chosen[2], "at_weight_1": at_one[2]["".join(GROUPS)]}
    return {"what": "ten-way accuracy on test images of the digits learned; chance of always one digit: 0.17",
            "weights_tried": [round(s, 3) for s in SIZES], "alone": alone, "methods": rows}  # fmt: skip


def input_grams(model: Any, names: list[str], forward: Callable[[], Any]) -> dict[str, Any]:
    """Return X^T X of the inputs that every module sees while ``forward`` runs."""
    modules, found, hooks = dict(model.named_modules()), {}, []

    def watch(name: str) -> Callable[..., None]:
        def hook(_: Any, given: Any, __: Any) -> None:
            x = given[0].reshape(-1, given[0].shape[-1]).double()
            found[name] = found.get(name, 0) + (x.T @ x).numpy()

        return hook

    for name in names:
        hooks.append(modules[name.removesuffix(".weight")].register_forward_hook(watch(name)))
    forward()
    for hook in hooks:
        hook.remove()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--only", choices=["truncation", "dense_forms", "memory", "hundred", "accuracy"])
    args = parser.parse_args()
    parts: dict[str, Callable[[Path], Any]] = {
        "truncation": lambda w: truncation(w, args.runs, args.layers),
        "dense_forms": lambda w: dense_forms(args.runs),
        "memory": memory,
        "hundred": hundred,
        "accuracy": lambda w: accuracy(),
    }
    chosen = {}
    for name, part in parts.items():
        if args.only in (None, name):
            with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
                chosen[name] = part(Path(folder))
    load = os.getloadavg()[0]
    bench.write("fuse", {"load_average_at_the_end": round(load, 1), **chosen}, args.out)


if __name__ == "__main__":
    main()
