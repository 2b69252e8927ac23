"""Ways to an adapter of rank 8, 4, 2, 1 on the digits: plain, weighted, nested, annealed, against training at the rank.

python tests/bench/quality_nested.py --out docs/bench/quality_nested.json

Plain, weighted and nested start from the committed r32 adapter; statistics are those of the training images, through
the base with that adapter and without it. Annealed (from 32) and direct training use transformers' Trainer for the 250
steps and at the learning rates of fixtures/make.py, with three seeds.
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
RANKS, SEEDS, STEPS = (8, 4, 2, 1), (2, 3, 4), 250
DIRECT = "trained at the rank"
TRAINED = ((DIRECT, 4, 2e-3), ("annealed, projected", 4, 1e-3), ("annealed, projected", 1, 1e-3))  # rates of make.py


def loaded(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench = loaded("_bench", Path(__file__).with_name("_bench.py"))
digits = loaded("digits", ROOT / "fixtures" / "digits.py")


def accuracy(adapter: lt.Adapter, folder: Path) -> float:
    """Measure an adapter as PEFT applies it."""
    return round(digits.accuracy(digits.load_adapter(lt.save(adapter, folder)), digits.NEW), 4)


def statistics() -> dict[str, Any]:
    """What the layers see of the training images: with the adapter that is squeezed, and without it."""
    pixels, labels = digits.images(digits.NEW, "train")
    batches = [{"pixel_values": x, "labels": y} for x, y in zip(pixels.split(64), labels.split(64), strict=True)]
    tuned = digits.load_adapter(digits.DIGITS / "r32").eval()
    return {
        "diagonal": {"stats": lt.collect_stats(tuned, batches)},
        "gram": {"stats": lt.collect_stats(tuned, batches, gram=True)},
        "gram of the base alone": {"stats": lt.collect_stats(digits.load_base(), batches, gram=True)},
        "gram and gradients": {"stats": lt.collect_stats(tuned, batches, gram=True, gradients=True)},
        "norm": {"stats": "norm", "base": str(digits.DIGITS / "base")},
    }


def squeezed(work: Path) -> list[dict[str, Any]]:
    """Every way that needs no training, at every rank."""
    source = lt.load(digits.DIGITS / "r32")
    ways: dict[str, Any] = {"plain": {}, **statistics()}
    gram = ways["gram"]["stats"]
    nested = {"plain": lt.squeeze(source, nested=True), "gram": lt.squeeze(source, nested=True, stats=gram)}
    rows = []
    for rank in RANKS:
        for name, options in ways.items():
            done = lt.squeeze(source, rank=rank, **options)
            assert done.report is not None
            total = done.report.total
            rows.append({"way": name, "rank": rank, "relative_error": round(total["relative_error"], 4),
                         "weighted_error": round(total.get("weighted_error", float("nan")), 4)
                         if "weighted_error" in total else None,
                         "accuracy": accuracy(done, work / f"{name}-{rank}".replace(" ", "-"))})  # fmt: skip
        for name, whole in nested.items():
            part = lt.slice(whole, rank=rank, scale_rule="keep")
            assert part.report is not None
            rows.append({"way": f"nested, {name}: slice", "rank": rank,
                         "relative_error": round(part.report.total["prefix_error"], 4), "weighted_error": None,
                         "accuracy": accuracy(part, work / f"nested-{name}-{rank}")})  # fmt: skip
        raw = lt.slice(source, rank=rank, scale_rule="keep")
        assert raw.report is not None
        rows.append({"way": "slice without nesting", "rank": rank, "weighted_error": None,
                     "relative_error": round(raw.report.total["prefix_error"], 4),
                     "accuracy": accuracy(raw, work / f"raw-{rank}")})  # fmt: skip
    return rows


def trained(rank: int, seed: int, lr: float, **annealed: Any) -> tuple[float, list[dict[str, Any]]]:
    """Train with the Trainer for the fixture's number of steps; return the accuracy and the annealer's history."""
    import transformers

    model = digits.new_adapter(digits.load_base(), rank=32 if annealed else rank, seed=seed)
    pixels, labels = digits.images(digits.NEW, "train")
    data = [{"pixel_values": x, "labels": y} for x, y in zip(pixels, labels, strict=True)]
    callbacks = [lt.RankAnnealer(rank, **annealed)] if annealed else []
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, max_steps=STEPS, per_device_train_batch_size=32, learning_rate=lr, weight_decay=0.01,
            lr_scheduler_type="cosine", warmup_steps=STEPS // 10, seed=seed, data_seed=seed, use_cpu=True,
            report_to=[], disable_tqdm=True, save_strategy="no", logging_strategy="no",
        )  # fmt: skip
        transformers.Trainer(model, arguments, train_dataset=data, callbacks=callbacks).train()
    return round(digits.accuracy(model, digits.NEW), 4), callbacks[0].history if callbacks else []


def training() -> list[dict[str, Any]]:
    """Train at the rank, and from 32 down to it, with three seeds each; fixtures/digits/r1 is the direct rank 1."""
    rows = []
    for way, rank, lr in TRAINED:
        options = {} if way == DIRECT else {"optimizer_state": "project"}
        found = [trained(rank, seed, lr, **options) for seed in SEEDS]
        row = {"way": way, "rank": rank, "lr": lr, "accuracy": [a for a, _ in found]}
        if options:
            row["squeezes"] = [[h["rank_after"], h["step"], h["optimizer_state"]] for h in found[0][1]]
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    digits.deterministic(threads=1)
    with tempfile.TemporaryDirectory() as work:
        rows = squeezed(Path(work))
    print(rows, flush=True)
    rows += training()
    facts = {
        "test_images": len(digits.images(digits.NEW, "test").labels),
        "accuracy_r32": round(digits.accuracy(digits.load_adapter(digits.DIGITS / "r32"), digits.NEW), 4),
        "steps": STEPS,
        "seeds": SEEDS,
        "rows": rows,
    }
    bench.write("quality_nested", facts, args.out)


if __name__ == "__main__":
    main()
