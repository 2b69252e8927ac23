from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from loratools.core.adapter import Adapter
from loratools.errors import NeedsBaseError, NumericsError, UsageError
from loratools.kinds.dense import Dense
from loratools.kinds.dora import Dora
from loratools.kinds.hadamard import Hadamard
from loratools.kinds.lowrank import LowRank
from loratools.ops.types.lora import to_lora


def low(rng: Any, m: int, n: int, scale: float = 0.5) -> LowRank:
    return LowRank(
        rng.standard_normal((m, 3)).astype(np.float32), rng.standard_normal((3, n)).astype(np.float32), scale
    )


def weight(rng: Any, *shape: int) -> Any:
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("exact", [False, True])
def test_dora_to_lora_is_the_nearest_and_tells_its_error(axis: int, exact: bool, rng: Any) -> None:
    w, u = weight(rng, 60, 40), low(rng, 60, 40, 0.05)
    magnitude = np.linalg.norm(w + u.dense(), axis=1 - axis) * (1 + 0.02 * rng.standard_normal(w.shape[axis]))
    dora = Dora(u, magnitude.astype(np.float32), axis)
    d = dora.apply(w.astype(np.float64)) - w
    for rank in (3, 10):
        done = to_lora(Adapter({"x.weight": dora}), {"x.weight": w}, rank=rank, exact=exact)
        error = np.linalg.norm(done["x.weight"].dense() - d) / np.linalg.norm(d)  # type: ignore[attr-defined]
        s = np.linalg.svd(d, compute_uv=False)
        best = np.linalg.norm(s[rank:]) / np.linalg.norm(s)
        assert error <= best * (1 + 5e-3) + 1e-5
        assert done.report is not None
        row = done.report.modules[0]
        assert row["relative_error"] == pytest.approx(error, rel=1e-4)
        assert row["rank_after"] == rank


def test_the_magnitude_is_never_dropped(rng: Any) -> None:
    """What PEFT's own conversion gives, the direction alone, is much farther away at full rank of the direction."""
    w, u = weight(rng, 60, 40), low(rng, 60, 40, 0.05)
    dora = Dora(u, (1.1 * np.linalg.norm(w + u.dense(), axis=1)).astype(np.float32))
    d = dora.apply(w.astype(np.float64)) - w
    done = to_lora(Adapter({"x.weight": dora}), {"x.weight": w}, rank=40)["x.weight"]
    assert np.linalg.norm(done.dense() - d) <= 1e-4 * np.linalg.norm(d)  # type: ignore[attr-defined]
    assert np.linalg.norm(u.dense() - d) > 0.5 * np.linalg.norm(d)


def test_the_total_is_over_all_modules(rng: Any) -> None:
    """sqrt(sum of squared errors / sum of squared norms), not a mean of ratios."""
    updates, base, lost, square = {}, {}, 0.0, 0.0
    for i, size in enumerate((1.0, 10.0)):
        w, u = size * weight(rng, 30, 20), low(rng, 30, 20, 0.05)
        updates[f"l{i}.weight"] = Dora(u, (1.1 * np.linalg.norm(w + u.dense(), axis=1)).astype(np.float32))
        base[f"l{i}.weight"] = w
    done = to_lora(Adapter(updates), base, rank=4)
    for name, w in base.items():
        d = updates[name].apply(w.astype(np.float64)) - w
        lost, square = lost + np.linalg.norm(done[name].dense() - d) ** 2, square + np.linalg.norm(d) ** 2
    assert done.report is not None
    assert done.report.total["relative_error"] == pytest.approx((lost / square) ** 0.5, rel=1e-3)
    assert done.report.total["worst"] == max(row["relative_error"] for row in done.report.modules)


def test_a_wrong_base_is_warned_about(rng: Any) -> None:
    """Magnitudes follow the rows of the base of training, and say nothing of another of the same shape."""
    w, other = (weight(rng, 300, 20) * (0.1 + rng.random((300, 1))).astype(np.float32) for _ in range(2))
    dora = Dora(low(rng, 300, 20, 0.01), np.linalg.norm(w, axis=1).astype(np.float32))
    right, wrong = (to_lora(Adapter({"x.weight": dora}), {"x.weight": base}).report for base in (w, other))
    assert right is not None
    assert wrong is not None
    assert right.warnings == ()
    assert any("is this the base" in line for line in wrong.warnings)


def test_other_kinds(rng: Any) -> None:
    """Exact factors stay exact at any rank that holds them; a formed difference needs a rank; a bias is carried."""
    loha, bias, full = Hadamard.example(0), Dense(weight(rng, 5)), Dense(weight(rng, 5, 7))
    done = to_lora(Adapter({"x.weight": loha, "x.bias": bias}))
    assert isinstance(done["x.weight"], LowRank)
    assert done["x.bias"] is bias
    assert np.allclose(done["x.weight"].dense(), loha.dense(), atol=1e-6)
    assert done.report is not None
    assert done.report.total["relative_error"] == 0.0
    two = to_lora(Adapter({"x.weight": loha}), rank=2)
    assert two["x.weight"].rank == 2  # type: ignore[attr-defined]
    s = np.linalg.svd(loha.dense(), compute_uv=False)
    assert two.report is not None
    assert two.report.total["worst"] == pytest.approx(np.linalg.norm(s[2:]) / np.linalg.norm(s), rel=1e-4)
    with pytest.raises(UsageError, match="no rank") as caught:
        to_lora(Adapter({"x.weight": full}))
    assert caught.value.parameter == "x.weight"
    assert np.allclose(to_lora(Adapter({"x.weight": full}), rank=5)["x.weight"].dense(), full.dense(), atol=1e-5)  # type: ignore[attr-defined]


def test_refusals(rng: Any) -> None:
    w, u = weight(rng, 6, 4), low(rng, 6, 4)
    dora = Dora(u, np.ones(6, np.float32))
    with pytest.raises(NumericsError, match="row"):
        to_lora(Adapter({"x.weight": dora}), {"x.weight": -u.dense()})
    with pytest.raises(UsageError, match="rank"):
        to_lora(Adapter({"x.weight": u}), {"x.weight": w}, rank=0)
    with pytest.raises(NeedsBaseError) as caught:
        to_lora(Adapter({"x.weight": dora}))
    assert "--base" in str(caught.value)
