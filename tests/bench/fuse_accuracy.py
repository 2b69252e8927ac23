"""Accuracy of fused adapters: three adapters of disjoint digit groups, fused by every method.

    python tests/bench/fuse_accuracy.py --out docs/bench/fuse-accuracy.json

Every method runs once, at equal weights and its default settings; one number, the size by which its result is
multiplied (the lambda of the papers), is chosen for each on training images of all three groups. Methods for two
adapters are applied pair by pair. Accuracy is ten-way, on test images.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

import loratools as lt
from loratools.fusion.base import FUSIONS

ROOT = Path(__file__).parents[2]
GROUPS = ("56", "78", "90")
ALL = "".join(GROUPS)
SIZES = (0.1, 0.15, 0.2, 0.25, 0.3333, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 4.0)


def loaded(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench = loaded("_bench", Path(__file__).with_name("_bench.py"))
digits = loaded("digits", ROOT / "fixtures" / "digits.py")


@dataclass(frozen=True)
class Judge:
    """The fixture's model, to which updates are added, and its weights before that."""

    model: Any
    before: Mapping[str, torch.Tensor]

    @classmethod
    def new(cls) -> Judge:
        model = digits.load_base()
        return cls(model, {name: value.clone() for name, value in model.state_dict().items()})

    def put(self, adapter: Mapping[str, Any], size: float = 1.0) -> None:
        """Give the model its first weights plus ``size`` times the adapter's updates."""
        added = {n: torch.from_numpy(np.asarray(u.dense(), np.float32)) for n, u in adapter.items()}
        self.model.load_state_dict({n: w + size * added[n] if n in added else w for n, w in self.before.items()})

    def share(self, which: str, split: str = "test") -> float:
        """Return the share of images named right among all ten digits."""
        pixels, labels = digits.images(which, split)
        return float((digits._logits(self.model, pixels).argmax(-1) == labels).double().mean())

    def tested(self) -> dict[str, float]:
        """Return the accuracy on every group and on all of them."""
        return {which: round(self.share(which), 4) for which in (*GROUPS, ALL)}

    def moments(self, adapter: Mapping[str, Any], group: str) -> dict[str, Any]:
        """Return the mean of x x^T over the inputs of every adapted module, on the group's training images."""
        self.put(adapter)
        modules, sums, counts = dict(self.model.named_modules()), {}, {}

        def watch(name: str) -> Callable[..., None]:
            def hook(_: Any, given: Any, __: Any) -> None:
                x = given[0].reshape(-1, given[0].shape[-1]).double()
                sums[name] = sums.get(name, 0) + (x.T @ x).numpy()
                counts[name] = counts.get(name, 0) + len(x)

            return hook

        watched = [n.removesuffix(".weight") for n in adapter]
        hooks = [modules[name].register_forward_hook(watch(name)) for name in watched]
        digits._logits(self.model, digits.images(group, "train").pixels)
        for hook in hooks:
            hook.remove()
        return {f"{name}.in_gram": sums[name] / counts[name] for name in watched}


def fused(method: str, adapters: list[Any], stats: list[dict[str, Any]]) -> Any:
    """Fuse at equal weights; pair by pair where the method takes two."""
    if FUSIONS[method].most == 2:
        first = lt.fuse(adapters[:2], method=method)
        return lt.fuse([first, adapters[2]], method=method, weights=[2.0, 1.0])
    more = {"stats": stats} if "statistics" in FUSIONS[method].handed_over else {}
    return lt.fuse(adapters, method=method, **more)


def row(judge: Judge, adapter: Any) -> dict[str, Any]:
    """Choose the size on training images, and test there and at size 1."""
    found = []
    for size in SIZES:
        judge.put(adapter, size)
        found.append((judge.share(ALL, "train"), size))
    size = max(found)[1]
    judge.put(adapter)
    plain = judge.tested()[ALL]
    judge.put(adapter, size)
    return {"size": size, **judge.tested(), "at_size_1": plain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    digits.deterministic(threads=1)
    adapters = [lt.load(digits.DIGITS / f"group-{g}") for g in GROUPS]
    judge = Judge.new()
    beside: dict[str, Any] = {"base": judge.tested()}
    for group, adapter in zip(GROUPS, adapters, strict=True):
        judge.put(adapter)
        beside[f"group-{group} alone"] = judge.tested()
    counts = [len(digits.images(g, "test").labels) for g in GROUPS]
    own = [beside[f"group-{g} alone"][g] for g in GROUPS]
    ceiling = round(sum(n * a for n, a in zip(counts, own, strict=True)) / sum(counts), 4)
    beside["every group by its own adapter"] = {**dict(zip(GROUPS, own, strict=True)), ALL: ceiling}
    stats = [judge.moments(a, g) for g, a in zip(GROUPS, adapters, strict=True)]
    rows = {name: row(judge, fused(name, adapters, stats)) for name in FUSIONS}
    figures = {"test_images": dict(zip(GROUPS, counts, strict=True)), "sizes_tried": SIZES, "beside": beside}
    bench.write("fuse-accuracy", {**figures, "methods": rows}, args.out)


if __name__ == "__main__":
    main()
