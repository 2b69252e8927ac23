"""Rank bounds of types: kept by the update, known without forming it, and enough for squeezing to lose nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import loratools as lt
from loratools.kinds.lowrank import low_rank

LINEAR = ("down", "up", "square")
BOUNDS: dict[str, tuple[str, dict[str, Any], int]] = {
    "adalora": ("AdaLoraConfig", {"init_r": 4, "total_step": 10}, 4),
    "loha": ("LoHaConfig", {"r": 4}, 16),
    "lokr": ("LoKrConfig", {"r": 1, "decompose_both": True, "decompose_factor": 4}, 1),
    "vera": ("VeraConfig", {"r": 5}, 5),
    "pvera": ("PveraConfig", {"r": 5}, 5),
    "vblora": ("VBLoRAConfig", {"r": 3, "num_vectors": 9, "vector_length": 4, "topk": 2}, 3),
    "unilora": ("UniLoraConfig", {"r": 3, "theta_d_length": 50}, 3),
    "tinylora": ("TinyLoraConfig", {"r": 3, "u": 5}, 3),
    "miss": ("MissConfig", {"r": 5}, 5),
    "miss-mini": ("MissConfig", {"r": 4, "mini_r": 6, "init_weights": "mini"}, 4),
    "delora": ("DeloraConfig", {"r": 3}, 3),
    "gralora": ("GraloraConfig", {"r": 4, "gralora_k": 2, "hybrid_r": 2}, 10),
    "fourierft": ("FourierFTConfig", {"n_frequency": 5}, 10),
    "waveft": ("WaveFTConfig", {"n_frequency": 5, "wavelet_family": "db3"}, 5),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_the_bound_holds_and_squeezing_at_it_is_exact(name: str, oracle: Callable[..., Any]) -> None:
    config, fields, bound = BOUNDS[name]
    made = oracle(config, LINEAR, **fields)
    adapter, true = made.read(), made.changes()
    for parameter, d in true.items():
        flat = low_rank(adapter[parameter])
        assert flat is not None
        assert flat.rank <= bound
        s = np.linalg.svd(d, compute_uv=False)
        assert s[bound:].max(initial=0.0) <= 2e-6 * s[0]  # what PEFT's fp32 leaves
    done = lt.squeeze(adapter, rank=bound, base=made.base)
    assert done.report is not None
    for parameter, d in true.items():
        assert np.abs(done[parameter].dense() - d).max() <= 2e-6 * max(np.abs(d).max(), 0.1)  # type: ignore[attr-defined]
    assert done.report.total["relative_error"] <= 1e-6
