"""Where intruder dimensions appear on the trained fixtures, and what taming them does to accuracy.

    python tests/bench/intruders.py --out docs/bench/intruders.json

The base knows the digits 0-4; the others learned 5-9 from it: a full fine-tune, adapters of rank 1, 4 and 32.
Judged are the 16 matrices that the adapters train (the same ones of the full fine-tune), 10 leading directions each.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import loratools as lt
from loratools.core.adapter import Adapter
from loratools.ops.whole_model import whole_model


def by_path(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench = by_path(Path(__file__).with_name("_bench.py"))
digits = by_path(Path(__file__).parents[2] / "fixtures" / "digits.py")
BASE = digits.DIGITS / "base"
ADAPTERS = ("r1", "r1-rslora", "r1-dora", "r4", "r4-rslora", "r4-dora", "r32", "r32-rslora", "r32-dora")


def row(name: str, adapter: Adapter) -> dict[str, Any]:
    """Return counts of intruders by threshold and position, relative size, and accuracies."""
    report = lt.diagnose(adapter, base=BASE)
    curves = [one["intruder_curve"] for one in report.modules]
    found = digits.measure(digits.load(digits.DIGITS / name), digits.NEW)
    return {
        "model": name,
        "relative_norm": round(report.total["relative_norm"], 3),
        "intruders": report.total["intruders"],
        "matrices_with_intruders": sum(one["intruders"] > 0 for one in report.modules),
        "in_first_place": sum(1 in one["intruder_index"] for one in report.modules),
        "at_eps": {str(p["eps"]): sum(c[i]["at_least"] for c in curves) for i, p in enumerate(curves[0])},
        "new_digits": found["new"],
        "old_among_old": found["old_among_old"],
    }


def tamed(name: str, lam: float, *, every: bool, work: Path) -> dict[str, Any]:
    """Return accuracies of an adapter whose intruders were scaled."""
    done = lt.tame(lt.load(digits.DIGITS / name), base=BASE, lam=lam, every=every)
    path = lt.save(done, work / f"{name}-{lam}-{every}", dtype="float32")
    found = digits.measure(digits.load_adapter(path), digits.NEW)
    said = {"model": name, "lambda": lam, "scaled": "all" if every else "first"}
    return {**said, "new_digits": found["new"], "old_among_old": found["old_among_old"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    names = list(lt.load(digits.DIGITS / "r4"))
    full = whole_model(digits.DIGITS / "tuned")
    rows = [row("tuned", replace(full, updates={name: full[name] for name in names}))]
    rows += [row(name, lt.load(digits.DIGITS / name)) for name in ADAPTERS]
    with tempfile.TemporaryDirectory() as folder:
        scaled = [
            tamed(name, lam, every=every, work=Path(folder))
            for name in ("r1", "r4", "r32")
            for every in (False, True)
            for lam in (1.0, 0.75, 0.5, 0.25, 0.0)
        ]
    bench.write("intruders", {"models": rows, "tamed": scaled}, args.out)


if __name__ == "__main__":
    main()
