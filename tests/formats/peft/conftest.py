"""PEFT as the oracle of its types: tiny layers, random trainables, ``save_pretrained``, ``merge_and_unload``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratools as lt
from loratools.io.base import Base

torch = pytest.importorskip("torch", reason="torch is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")
conv1d = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed").Conv1D

LAYERS: dict[str, Callable[[], Any]] = {
    "down": lambda: torch.nn.Linear(36, 24),
    "up": lambda: torch.nn.Linear(24, 36),
    "square": lambda: torch.nn.Linear(24, 24),
    "turned": lambda: conv1d(36, 24),  # stored (24, 36)
    "turned_square": lambda: conv1d(24, 24),
    "conv": lambda: torch.nn.Conv2d(4, 6, 3),
    "point": lambda: torch.nn.Conv2d(8, 6, 1),
    "line": lambda: torch.nn.Conv1d(4, 6, 3),
    "embedding": lambda: torch.nn.Embedding(37, 24),
    "norm": lambda: torch.nn.LayerNorm(24),
}
"""The layers of the toy model, by the name of the module."""


class Toy(torch.nn.Module):
    """Layers side by side: only their weights matter."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, LAYERS[name]())

    def forward(self, x: Any) -> Any:
        return x


class Oracle:
    """A toy base, its adapter in ``folder``, and what PEFT makes of both."""

    def __init__(self, folder: Path, config: Any, targets: Sequence[str], seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.folder, self.targets = folder, targets
        toy = Toy(targets)
        for parameter in toy.parameters():
            if not parameter.any():  # a bias of zeros would hide its change
                parameter.data.normal_(std=0.1)
        self.base = {name: t.detach().clone().numpy() for name, t in toy.state_dict().items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = peft.get_peft_model(toy, config).eval()
            with torch.no_grad():
                for parameter in self.model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn(parameter.shape) * 0.3)
            self.model.save_pretrained(folder)

    def plain(self) -> Any:
        """Return the model without its adapter."""
        toy = Toy(self.targets)
        toy.load_state_dict({name: torch.from_numpy(w.copy()) for name, w in self.base.items()})
        return toy

    def changes(self) -> dict[str, Any]:
        """Return parameter -> ``merge_and_unload() - W`` of every parameter that changes, fp64."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = self.model.merge_and_unload().state_dict()
        found = {name: merged[name].double().numpy() - w for name, w in self.base.items()}
        return {name: d for name, d in found.items() if np.abs(d).max() > 0}

    def read(self, *, base: bool = True) -> Any:
        """Return the adapter as loratools reads it, with or without the base's header and values."""
        return lt.load(self.folder, base=Base.open(self.base) if base else None)

    def read_changes(self) -> dict[str, Any]:
        """Return parameter -> what our update changes on the base, fp64."""
        wide = {name: w.astype(np.float64) for name, w in self.base.items()}  # nothing is lost in W's own rounding
        return {name: u.apply(wide[name]) - wide[name] for name, u in self.read().items()}


@pytest.fixture(scope="session")
def oracle_in() -> Callable[..., Oracle]:
    """oracle_in(folder, "LohaConfig", targets, r=4, ...) -> Oracle."""

    def make(folder: Path, config: str, targets: Sequence[str], seed: int = 0, **fields: Any) -> Oracle:
        said = getattr(peft, config)(target_modules=list(targets), **fields)
        return Oracle(folder, said, targets, seed)

    return make


@pytest.fixture
def oracle(tmp_path: Path, oracle_in: Callable[..., Oracle]) -> Callable[..., Oracle]:
    """oracle("LohaConfig", targets, r=4, ...) -> Oracle."""
    return partial(oracle_in, tmp_path / "adapter")
