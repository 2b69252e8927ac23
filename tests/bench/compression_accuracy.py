"""Accuracy of the trained fixture after low-bit and sparse compression: one table for all.

    python tests/bench/compression_accuracy.py --out docs/bench/compression_accuracy.json

The rank-32 adapter of the digits fixture (digits 5-9, ten-way accuracy on 450 test images or so), compressed and read
back, folded into the base, measured as the fixtures are.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import loratools as lt

ROOT = Path(__file__).parents[2]


def loaded(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


bench = loaded("_bench", Path(__file__).with_name("_bench.py"))
digits = loaded("digits", ROOT / "fixtures" / "digits.py")

WAYS: dict[str, Callable[[Any], Any]] = {
    "as trained, rank 32 fp32": lambda a: a,
    "quantize --bits 1": lambda a: lt.quantize(a, bits=1),
    "quantize --bits 2": lambda a: lt.quantize(a, bits=2),
    "quantize --avg-bits 1": lambda a: lt.quantize(a, avg_bits=1.0),
    "quantize --avg-bits 0.5": lambda a: lt.quantize(a, avg_bits=0.5),
    "binary-adapter, 1 bit, afterwards": lambda a: lt.quantize(a, bits=1, scheme="binary-adapter"),
    "shira --density 0.01": lambda a: lt.shira(a, density=0.01, to="native"),
    "shira --density 0.02": lambda a: lt.shira(a, density=0.02, to="native"),
    "shira --density 0.10": lambda a: lt.shira(a, density=0.10, to="native"),
    "rank 4 plus 1% sparse": lambda a: lt.shira(a, density=0.01, plus_lowrank=4, to="native"),
    "rank 4 alone (squeeze)": lambda a: lt.squeeze(a, rank=4),
}


def accuracy(adapter: Any) -> float:
    """Fold an adapter into the base and measure."""
    import torch

    base = digits.load_base()
    state = base.state_dict()
    for name, update in adapter.items():
        state[name] = torch.from_numpy(update.apply(state[name].numpy()))
    base.load_state_dict(state)
    return float(digits.accuracy(base, digits.NEW))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    digits.deterministic()
    source, rows = lt.load(digits.DIGITS / "r32"), []
    with tempfile.TemporaryDirectory() as work:
        for name, way in WAYS.items():
            done = way(source)
            back = lt.load(lt.save(done, Path(work) / "x.safetensors", format="native", overwrite=True))
            total = {} if done.report is None else done.report.total
            rows.append(
                {
                    "way": name,
                    "bytes": sum(int(t.nbytes) for u in back.values() for t in bench_tensors(u)),
                    "relative_error": total.get("relative_error", 0.0),
                    "accuracy": round(accuracy(back), 4),
                }
            )
            print(rows[-1], flush=True)
    bench.write(
        "compression_accuracy", {"test_images": len(digits.images(digits.NEW, "test").labels), "rows": rows}, args.out
    )


def bench_tensors(update: Any) -> list[Any]:
    from loratools.core.update import tensors

    return [t for _, t in tensors(update)]


if __name__ == "__main__":
    main()
