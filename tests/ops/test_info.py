from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratools as lt
from loratools.kinds.lowrank import LowRank
from loratools.ops.oddities import oddities

RNG = np.random.default_rng(0)
PRE = "base_model.model."


def adapter(tensors: dict[str, Any] | None = None, **config: Any) -> lt.Adapter:
    right = {
        f"{PRE}{m}.lora_{x}.weight": RNG.standard_normal(s).astype(np.float32)
        for m in ("q", "k")
        for x, s in (("A", (4, 6)), ("B", (8, 4)))
    }
    said = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "org/model", **config}
    return lt.from_state_dict({**right, **(tensors or {})}, said)


def odd(a: lt.Adapter) -> str:
    return "\n".join(oddities(a))


def test_nothing_is_odd_about_a_good_adapter() -> None:
    assert oddities(adapter()) == ()


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        ({f"{PRE}q.lora_B.weight": np.zeros((8, 4), np.float32)}, {}, "q.weight: a factor is all zeros"),
        (
            {
                f"{PRE}q.lora_A.weight": np.ones((4, 6), np.float32),
                f"{PRE}k.lora_A.weight": np.ones((4, 6), np.float32),
            },
            {},
            "duplicated",
        ),
        ({}, {"base_model_name_or_path": "/home/me/model"}, "local path"),
        ({}, {"base_model_name_or_path": "C:\\models\\x"}, "local path"),
        ({}, {"base_model_name_or_path": None}, "does not name its base"),
        ({}, {"r": 8}, "the config says rank 8, the tensors have 4"),
        ({}, {"rank_pattern": {"nothing": 2}}, "match no module"),
        ({}, {"alpha_pattern": {"q": 2}}, "different scales"),
        ({f"{PRE}q.lora_A.weight": np.ones((4, 6), np.float16)}, {}, "several dtypes"),
        ({}, {"init_lora_weights": "pissa"}, "altered base"),
        ({}, {"init_lora_weights": "pissa_niter_16"}, "altered base"),
    ],
)
def test_what_is_odd(tensors: dict[str, Any], config: dict[str, Any], words: str) -> None:
    assert words in odd(adapter(tensors, **config))


def test_figures(digits: Path) -> None:
    a = lt.load(digits / "r32")
    report = lt.info(a)
    assert report.total["format"] == "peft"
    assert report.total["ranks"] == {"32": len(report.modules)}
    assert report.total["bytes"] == a.nbytes
    first = next(iter(a.values()))
    assert isinstance(first, LowRank)
    assert report.modules[0]["scale"] == first.scale
