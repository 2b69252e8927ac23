"""What a squeeze does to accuracy: rank 32 -> 4 and 1, against training at that rank, and with 100 more steps.

python tests/bench/quality.py --out docs/bench/quality.json
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import loratools as lt

ROOT = Path(__file__).parents[2]
MORE_STEPS, SEEDS = 100, (0, 1, 2)


def loaded(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench = loaded("_bench", Path(__file__).with_name("_bench.py"))
digits = loaded("digits", ROOT / "fixtures" / "digits.py")
make = ROOT / "fixtures" / "make.py"


def row(variant: str, rank: int, lr: float, work: Path) -> dict[str, Any]:
    """Squeeze r32 of a variant to ``rank``; measure it, direct training at that rank, and the squeeze trained on."""
    suffix = "" if variant == "plain" else f"-{variant}"
    squeezed = lt.squeeze(lt.load(digits.DIGITS / f"r32{suffix}"), rank=rank)
    folder = lt.save(squeezed, work / f"r32{suffix}-r{rank}")
    assert squeezed.report is not None
    more = []
    for seed in SEEDS:
        model = digits.load_adapter(folder, trainable=True)
        digits.train(model, digits.images(digits.NEW, "train"), steps=MORE_STEPS, lr=lr, seed=seed)
        more.append(digits.accuracy(model, digits.NEW))
    return {
        "variant": variant,
        "rank": rank,
        "energy_kept": round(squeezed.report.total["energy"], 4),
        "relative_error": round(squeezed.report.total["relative_error"], 4),
        "accuracy_r32": digits.accuracy(digits.load_adapter(digits.DIGITS / f"r32{suffix}"), digits.NEW),
        "accuracy_trained_at_rank": digits.accuracy(
            digits.load_adapter(digits.DIGITS / f"r{rank}{suffix}"), digits.NEW
        ),
        "accuracy_squeezed": digits.accuracy(digits.load_adapter(folder), digits.NEW),
        f"accuracy_after_{MORE_STEPS}_more_steps": more,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    digits.deterministic()
    with tempfile.TemporaryDirectory() as work:
        rows = [row(v, k, args.lr, Path(work)) for v in digits.VARIANTS for k in (4, 1)]
    bench.write(
        "quality", {"test_images": len(digits.images(digits.NEW, "test").labels), "lr": args.lr, "rows": rows}, args.out
    )


if __name__ == "__main__":
    main()
