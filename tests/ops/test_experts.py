"""A base on the disk stores experts one by one, its program and PEFT hold them stacked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import loratools as lt
from loratools.errors import MismatchError, UnsupportedError
from loratools.io.base import Base
from loratools.kinds.stack import Stack
from loratools.ops.experts import one_by_one
from loratools.ops.merge import merge

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def test_merging_stacks_into_a_model_of_single_experts(make: Callable[..., Any], tmp_path: Path) -> None:
    made = make("mixtral", r=4, lora_alpha=8, target_modules=["q_proj", "gate"], target_parameters=EXPERTS)
    plain = type(made.base)(made.base.config)
    plain.load_state_dict({name: _tensor(w) for name, w in made.weights.items()})
    plain.save_pretrained(tmp_path / "base")
    made.model.merge_and_unload().save_pretrained(tmp_path / "peft")
    base = Base.open(tmp_path / "base")
    assert not any("gate_up_proj" in name for name in base)
    adapter = lt.load(made.folder, base=base)
    assert not adapter.meta.unmergeable
    merge(base, [adapter], tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / d / "model.safetensors") for d in ("ours", "peft"))
    assert ours.keys() == theirs.keys()
    for name, w in theirs.items():
        assert np.abs(ours[name] - w).max() <= 2e-6 * max(np.abs(w).max(), 1), name  # a few fp32 roundings


def _tensor(w: Any) -> Any:
    import torch

    return torch.from_numpy(np.array(w))


def test_experts_of_another_size_are_refused() -> None:
    ones = {f"mlp.experts.{e}.down_proj.weight": np.zeros((8, 5), np.float32) for e in range(3)}
    good = Stack(np.ones((3, 8, 2), np.float32), np.ones((3, 2, 5), np.float32))
    apart = one_by_one(lt.Adapter({"mlp.experts.down_proj": good}), Base.open(ones))
    assert list(apart) == list(ones)
    for shapes in (((3, 8, 2), (3, 2, 6)), ((2, 8, 2), (2, 2, 5))):
        bad = Stack(*(np.ones(s, np.float32) for s in shapes))
        with pytest.raises(MismatchError, match="experts do not fit"):
            one_by_one(lt.Adapter({"mlp.experts.down_proj": bad}), Base.open(ones))


def test_what_cannot_be_added_to_a_weight_is_not_merged(tmp_path: Path) -> None:
    pair = {"base_model.model.q.lora_A.weight": np.ones((1, 3), np.float32),
            "base_model.model.q.lora_B.weight": np.ones((2, 1), np.float32)}  # fmt: skip
    said = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "alora_invocation_tokens": [1]}
    base = {"q.weight": np.zeros((2, 3), np.float32)}
    with pytest.raises(UnsupportedError, match="after its invocation"):
        merge(base, [lt.from_state_dict(pair, said, base=base)], tmp_path / "out", dry_run=True)
