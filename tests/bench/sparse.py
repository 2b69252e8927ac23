"""Sparse adapters: switching one in place against merging the LoRA it came from, on a 1.1B-shaped checkpoint.

    python tests/bench/sparse.py --out docs/bench/sparse.json

Whole processes in turns: ``switch --on`` and ``--off`` of a 1% adapter, and ``merge`` of the rank-32 LoRA (bf16 model,
22 layers, ``--layers`` for fewer). Both force what they wrote to the disk before they end. ``disk``: in the temporary
directory; ``memory``: the same in ``--memory``, a file system without a disk (left out where there is none). Masks:
magnitude, whose entries lie in most pages of the model, and struct (``disk`` only), whose lie in few. ``floor_s``: the
same pages made dirty and forced to the disk by a bare loop. The checkpoint after on and off is compared byte for byte.
``in_memory``: the same on tensors already in memory, against adding the product to each.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import loratools as lt

spec = importlib.util.spec_from_file_location("_bench", Path(__file__).with_name("_bench.py"))
assert spec is not None
assert spec.loader is not None
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

PAGE = mmap.PAGESIZE
TOOL = str(Path(sys.executable).parent / "loratools")


def make_model(folder: Path, layers: int) -> Path:
    """Write a bf16 checkpoint of TinyLlama's shapes, embeddings included."""
    import ml_dtypes
    from safetensors.numpy import save_file

    rng = np.random.default_rng(1)
    noise = rng.standard_normal(1 << 22).astype(np.float32)

    def tensor(shape: tuple[int, ...]) -> np.ndarray:
        return (0.02 * np.resize(noise, shape)).astype(ml_dtypes.bfloat16)

    _, shapes = bench.SHAPES["1.1b"]
    tensors = {
        f"model.layers.{i}.{name}.weight": tensor(shape) for i in range(layers) for name, shape in shapes.items()
    }
    if layers == 22:
        tensors |= {"model.embed_tokens.weight": tensor((32000, 2048)), "lm_head.weight": tensor((32000, 2048))}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text("{}")
    return folder


def digest(folder: Path) -> str:
    with (folder / "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def in_memory(model: Path, lora: Path, sparse: Path, runs: int) -> dict[str, Any]:
    """Time putting on and taking off against W + b a on the first layers' tensors, held in fp32."""
    from loratools.io.base import Base

    base = Base.open(model)
    names = [n for n in base if n.startswith(("model.layers.0.", "model.layers.1."))]
    tensors = {n: base[n].astype(np.float32) for n in names}
    adapters = [lt.load(path, base=base) for path in (lora, sparse)]
    dense, few = ({n: u for n, u in a.items() if n in tensors} for a in adapters)
    from dataclasses import replace

    thin = replace(adapters[1], updates=few, meta=replace(adapters[1].meta, metadata={}))
    added, switched = [], []
    for _ in range(runs):
        start = time.perf_counter()
        for n, u in dense.items():
            u.apply(tensors[n])
        added.append(time.perf_counter() - start)
        board = lt.Switchboard(tensors)
        start = time.perf_counter()
        board.put_on(thin)
        switched.append(time.perf_counter() - start)
        board.take_off(thin)
    return {"add_s": added, "put_on_s": switched, "ratio": min(added) / min(switched)}


def touched(model: Path, sparse: Path) -> np.ndarray:
    """Return the numbers of the pages of the checkpoint that hold entries of the adapter."""
    from loratools.io.base import Base

    base, found = Base.open(model), []
    for name, u in lt.load(sparse, base=base).items():
        leaf = base.leaf(name)
        found.append(np.unique((leaf.load.start + leaf.nbytes // leaf.shape[0] // leaf.shape[1] * u.flat()) // PAGE))
    return np.unique(np.concatenate(found))


def floor(model: Path, pages: np.ndarray, runs: int) -> list[float]:
    """Time making pages dirty with the bytes that they hold, and forcing them to the disk."""
    seconds = []
    with (model / "model.safetensors").open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        whole = np.frombuffer(mapped, np.uint8)
        for _ in range(runs):
            start = time.perf_counter()
            whole[pages * PAGE] = whole[pages * PAGE]
            os.fsync(file.fileno())
            seconds.append(round(time.perf_counter() - start, 4))
        del whole
    return seconds


def processes(model: Path, sparse: Path, lora: Path | None, out: Path, runs: int) -> dict[str, Any]:
    """Measure switching on and off, beside merging where a LoRA is given."""
    commands = {
        "switch_on": [TOOL, "switch", str(model), "--on", str(sparse), "-q"],
        "switch_off": [TOOL, "switch", str(model), "--off", str(sparse), "-q"],
    }
    if lora is not None:
        commands["merge"] = [TOOL, "merge", str(model), str(lora), "-o", str(out), "--overwrite", "-q"]
    before = digest(model)
    found = bench.measure(commands, runs)
    pages = touched(model, sparse)
    told = {"processes": found, "identical_after_off": digest(model) == before, "touched_bytes": len(pages) * PAGE,
            "floor_s": floor(model, pages, runs)}  # fmt: skip
    if lora is None:
        return told
    ratios = [found["merge"]["median_s"] / found[name]["median_s"] for name in ("switch_on", "switch_off")]
    cpu = [statistics.median(found[name]["cpu_s"]) for name in ("merge", "switch_on", "switch_off")]
    return {**told, "merge_over_switch_on": ratios[0], "merge_over_switch_off": ratios[1],
            "median_ratio": statistics.median(ratios), "cpu_ratio": 2 * cpu[0] / (cpu[1] + cpu[2])}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        model = make_model(folder / "model", args.layers)
        lora = bench.make_adapter(folder / "lora", "1.1b", 32, "bfloat16", layers=args.layers)
        made = {mask: lt.shira(lt.load(lora), density=0.01, mask=mask, to="native") for mask in ("magnitude", "struct")}
        sparse = {mask: lt.save(a, folder / f"{mask}.safetensors", format="native") for mask, a in made.items()}
        figures = {
            "layers": args.layers,
            "bytes_model": (model / "model.safetensors").stat().st_size,
            "bytes_sparse": sparse["magnitude"].stat().st_size,
            "density": made["magnitude"].report.total["density"],
            "disk": processes(model, sparse["magnitude"], lora, folder / "merged", args.runs),
            "disk_struct": processes(model, sparse["struct"], None, folder / "merged", args.runs),
            "in_memory": in_memory(model, lora, sparse["magnitude"], args.runs),
        }
        if args.memory.is_dir():
            with tempfile.TemporaryDirectory(dir=args.memory) as fast:
                copy = Path(shutil.copytree(model, Path(fast) / "model"))
                shutil.rmtree(folder / "merged")
                figures["memory"] = processes(copy, sparse["magnitude"], lora, Path(fast) / "merged", args.runs)
    bench.write("sparse", figures, args.out)


if __name__ == "__main__":
    main()
