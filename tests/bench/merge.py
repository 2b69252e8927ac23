"""Merge as a whole process, beside copying the same bytes and beside PEFT; DoRA row norms beside PEFT's.

    python tests/bench/merge.py --only merge --out docs/bench/merge.json
    python tests/bench/merge.py --only norms --out docs/bench/row_norms.json

Rows: a 1.1B-shaped bf16 base (2.2 GB in 4 shards) with a LoRA of r = 32 on every linear layer, and the same as DoRA;
the copy reads and writes every byte, with fsync as the program does. Row norms at 11008 x 4096, r = 64, stand beside
their floor: the fp32 product B A of the same blocks, and the conversion of W.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

spec = importlib.util.spec_from_file_location("_bench", Path(__file__).with_name("_bench.py"))
assert spec is not None
assert spec.loader is not None
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

BIN = Path(sys.executable).parent
SHARDS, HIDDEN, VOCAB = 4, 2048, 32000
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": 5632,
    "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": VOCAB,
    "torch_dtype": "bfloat16", "tie_word_embeddings": False, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
}  # fmt: skip
COPY = """
import os, sys
from pathlib import Path
buffer = memoryview(bytearray(1 << 22))
out = Path(sys.argv[2])
out.mkdir(exist_ok=True)
for source in sorted(Path(sys.argv[1]).iterdir()):
    with source.open("rb", buffering=0) as file, (out / source.name).open("wb", buffering=0) as copy:
        while count := file.readinto(buffer):
            copy.write(buffer[:count])
        os.fsync(copy.fileno())
"""
PEFT = """
import sys
import torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload()
model.save_pretrained(sys.argv[3])
"""


def make_base(folder: Path) -> Path:
    """Write the base: weights of deviation 0.02, norms of ones."""
    import ml_dtypes
    from safetensors.numpy import save_file

    count, shapes = bench.SHAPES["1.1b"]
    rng = np.random.default_rng(0)
    pool = (0.02 * rng.standard_normal((VOCAB, HIDDEN))).astype(ml_dtypes.bfloat16)

    def weight(m: int, n: int) -> Any:
        return np.roll(pool, int(rng.integers(pool.size))).reshape(-1)[: m * n].reshape(m, n).copy()

    names: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for i in range(count):
        names |= {f"model.layers.{i}.{module}.weight": shape for module, shape in shapes.items()}
        names |= {f"model.layers.{i}.{n}.weight": (HIDDEN,) for n in ("input_layernorm", "post_attention_layernorm")}
    names |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    table, listed = {}, list(names)
    for i in range(SHARDS):
        part = listed[i * len(listed) // SHARDS : (i + 1) * len(listed) // SHARDS]
        file = f"model-{i + 1:05d}-of-{SHARDS:05d}.safetensors"
        tensors = {n: weight(*names[n]) if len(names[n]) == 2 else np.ones(HIDDEN, ml_dtypes.bfloat16) for n in part}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        table |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def make_dora(base: Path, lora: Path, out: Path) -> Path:
    from loratools.files import load, save
    from loratools.ops.types.dora import to_dora

    adapter = to_dora(load(lora, base=base), base)
    return save(adapter, out, overwrite=True)


def merging(work: Path, runs: int, *, with_peft: bool) -> dict[str, Any]:
    base = make_base(work / "base")
    lora = bench.make_adapter(work / "lora", "1.1b", 32, "bfloat16")
    dora = make_dora(base, lora, work / "dora")
    loratools = [str(BIN / "loratools"), "merge", str(base)]
    commands = {
        "copy with fsync": [sys.executable, "-c", COPY, str(base), str(work / "copy")],
        "loratools, no report": [*loratools, str(lora), "-o", str(work / "m"), "--overwrite", "--no-measure"],
        "loratools": [*loratools, str(lora), "-o", str(work / "m"), "--overwrite"],
        "loratools, DoRA": [*loratools, str(dora), "-o", str(work / "m-dora"), "--overwrite"],
    }
    found = bench.measure(commands, runs)
    shutil.rmtree(work / "copy")
    shutil.rmtree(work / "m-dora")
    if with_peft:
        peft = {"peft": [sys.executable, "-c", PEFT, str(base), str(lora), str(work / "peft")]}
        found |= bench.measure(peft, 1)
    floor = found["copy with fsync"]["median_s"]
    ours = found["loratools"]["median_s"]
    return {
        "shape": "1.1B, bf16, 2.2 GB in 4 shards, LoRA r=32 on 154 modules",
        "runs": found,
        "times_copy": {name: round(rows["median_s"] / floor, 2) for name, rows in found.items()},
        "times_slower_than_loratools": {name: round(rows["median_s"] / ours, 2) for name, rows in found.items()},
        "largest_parameter_mb": VOCAB * HIDDEN * 2 / 2**20,
        "differs_from_fp32_merge_rounded_once": differing(base, lora, work / "m"),
    }


def differing(base: Path, lora: Path, out: Path) -> float:
    """Share of the entries of one layer that differ from W + s B A in fp32, rounded once."""
    import ml_dtypes

    from loratools.files import load
    from loratools.io.base import Base

    before, after, adapter = Base.open(base), Base.open(out), load(lora)
    flips = total = 0
    for name in [n for n in adapter if ".layers.7." in n]:
        once = (before[name].astype(np.float32) + adapter[name].dense()).astype(ml_dtypes.bfloat16)
        flips, total = flips + int((once != after[name]).sum()), total + once.size
    return flips / total


def norms(runs: int) -> dict[str, Any]:
    """DoRA row norms of one matrix, two threads everywhere; worst relative error against float64."""
    import torch
    from peft.tuners.lora.dora import DoraLinearLayer

    from loratools.kinds.dora import sum_norms
    from loratools.kinds.lowrank import LowRank

    rng = np.random.default_rng(0)
    m, n, r, s = 11008, 4096, 64, 0.5
    w = (0.02 * rng.standard_normal((m, n))).astype(np.float32)
    b, a = (x.astype(np.float32) for x in bench.factors(rng, m, n, r))
    layer = DoraLinearLayer(fan_in_fan_out=False)
    result: dict[str, Any] = {"shape": "11008 x 4096, r=64"}
    for dtype in ("bfloat16", "float32"):
        tw, tb, ta = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in (w, b, a))
        stored = [_numpy(x) for x in (tw, tb, ta)]
        u = LowRank(stored[1], stored[2], s)
        wide = [x.astype(np.float64) for x in stored]
        exact = np.linalg.norm(wide[0] + s * (wide[1] @ wide[2]), axis=1)

        def peft_forward(tw: Any = tw, tb: Any = tb, ta: Any = ta) -> Any:
            eye = torch.eye(ta.shape[1], dtype=ta.dtype)
            delta = torch.nn.functional.linear(torch.nn.functional.linear(eye, ta), tb).T
            return layer.get_weight_norm(tw, delta, s)

        def ours(w: Any = stored[0], u: Any = u) -> Any:
            return sum_norms(w, u)

        rows = {
            "peft": timed(peft_forward, max(1, runs // 3)),
            "loratools": timed(ours, runs),
            "floor": timed(lambda stored=stored: floor(*stored), runs),
        }
        errors = {
            "peft": float(np.max(np.abs(peft_forward().float().numpy() / exact - 1))),
            "loratools": float(np.max(np.abs(ours() / exact - 1))),
        }
        ratio, most = (
            {key: round(rows["peft"][key] / rows[other][key], 1) for key in ("wall_s", "cpu_s")}
            for other in ("loratools", "floor")
        )
        result[dtype] = {
            "seconds": rows, "times_faster": ratio, "at_most": most, "worst_relative_error": errors,
            "floor_gflops": round(2e-9 * m * n * r / rows["floor"]["cpu_s"], 1),
        }  # fmt: skip
    return result


def floor(w: Any, b: Any, a: Any) -> None:
    """What no way round leaves out: 2 m n r flops in fp32, whether as B A or as W A^T, and W as fp32; two threads."""
    from concurrent.futures import ThreadPoolExecutor

    from loratools.core.pool import single_blas_thread
    from loratools.linalg.row_norms import BLOCK

    wide = a.astype(np.float32)

    def block(i: int) -> None:
        b[i : i + BLOCK].astype(np.float32) @ wide
        w[i : i + BLOCK].astype(np.float32)

    with single_blas_thread(), ThreadPoolExecutor(2) as pool:
        list(pool.map(block, range(0, w.shape[0], BLOCK)))


def _numpy(x: Any) -> Any:
    from loratools.linalg.namespace import to_numpy

    return to_numpy(x)


def timed(run: Callable[[], Any], runs: int) -> dict[str, float]:
    """Median wall and processor seconds; the latter hardly know of other work on the machine."""
    run()
    wall, cpu = [], []
    for _ in range(runs):
        start, used = time.perf_counter(), time.process_time()
        run()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
    return {"wall_s": round(statistics.median(wall), 4), "cpu_s": round(statistics.median(cpu), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", choices=["merge", "norms"])
    parser.add_argument("--no-peft", action="store_true")
    args = parser.parse_args()
    chosen: dict[str, Any] = {}
    if args.only in (None, "norms"):
        chosen["dora_row_norms"] = norms(3 * args.runs)
    if args.only in (None, "merge"):
        with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
            chosen["merge"] = merging(Path(folder), args.runs, with_peft=not args.no_peft)
    bench.write("merge", chosen, args.out)


if __name__ == "__main__":
    main()
