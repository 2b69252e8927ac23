"""The parity modes against PEFT itself: same factors, same products, same quirks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from loratools.fusion.base import FUSIONS
from loratools.fusion.content import content_key
from loratools.kinds.lowrank import LowRank
from loratools.linalg.seeds import uniform

torch = pytest.importorskip("torch", reason="torch is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

SIZES = (12, 9, 4)  # out, in, rank
# PEFT computes in fp32: sums of three products of rank 4, at most 100 roundings of the largest entry
CLOSE = 100 * float(np.finfo(np.float32).eps)


class Linear(torch.nn.Module):  # type: ignore[misc,name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.q = torch.nn.Linear(SIZES[1], SIZES[0], bias=False)


def model(count: int, alpha: float = 8) -> tuple[Any, list[LowRank]]:
    """A PEFT model with several random adapters, and the same as updates."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=SIZES[2], lora_alpha=alpha, target_modules=["q"])
    wrapped = peft.get_peft_model(Linear(), config, adapter_name="a0")
    for i in range(1, count):
        wrapped.add_adapter(f"a{i}", config)
    layer, updates = wrapped.base_model.model.q, []
    generator = torch.Generator().manual_seed(1)
    for i in range(count):
        for part in (layer.lora_A[f"a{i}"].weight, layer.lora_B[f"a{i}"].weight):
            part.data = torch.randn(part.shape, generator=generator)
        b, a = (x[f"a{i}"].weight.detach().numpy() for x in (layer.lora_B, layer.lora_A))
        updates.append(LowRank(b, a, layer.scaling[f"a{i}"]))
    return wrapped, updates


def by_peft(wrapped: Any, weights: list[float], **options: Any) -> tuple[np.ndarray, np.ndarray]:
    names = [f"a{i}" for i in range(len(weights))]
    wrapped.base_model.add_weighted_adapter(names, weights, "fused", **options)
    layer = wrapped.base_model.model.q
    assert layer.scaling["fused"] == 1.0
    return layer.lora_B["fused"].weight.detach().numpy(), layer.lora_A["fused"].weight.detach().numpy()


def assert_same(found: Any, b: np.ndarray, a: np.ndarray) -> None:
    assert np.abs(found.b - b).max() <= CLOSE * np.abs(b).max()
    assert np.abs(found.a - a).max() <= CLOSE * np.abs(a).max()
    assert found.scale == 1.0


@pytest.mark.parametrize("weights", [[0.5, 0.25, 1.0], [0.5, -0.25, 1.0]])
def test_linear(weights: list[float]) -> None:
    wrapped, updates = model(3)
    assert_same(FUSIONS["peft-linear"].run(updates, weights), *by_peft(wrapped, weights, combination_type="linear"))


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("weights", [[0.5, 0.25, 1.0], [0.5, -0.25, 1.0]])
def test_ties(weights: list[float], sign: str) -> None:
    wrapped, updates = model(3)
    theirs = by_peft(wrapped, weights, combination_type="ties", density=0.3, majority_sign_method=sign)
    assert_same(FUSIONS["peft-ties"].run(updates, weights, density=0.3, sign=sign), *theirs)


@pytest.mark.parametrize("kind", ["linear", "ties"])
def test_dare_with_our_masks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT draws its masks from a generator nobody can seed; given ours, it computes the same."""
    wrapped, updates = model(3)
    weights = [0.5, 0.25, 1.0]
    masks = iter(  # PEFT goes through all A's, then through all B's
        uniform(content_key(u, 0, side), *x.shape) < 0.6
        for side, factors in (("a", [u.a for u in updates]), ("b", [u.b for u in updates]))
        for u, x in zip(updates, factors, strict=True)
    )
    monkeypatch.setattr(torch, "bernoulli", lambda full: torch.from_numpy(next(masks).astype(np.float32)))
    theirs = by_peft(wrapped, weights, combination_type=f"dare_{kind}", density=0.6)
    assert_same(FUSIONS[f"peft-dare-{kind}"].run(updates, weights, density=0.6), *theirs)


def test_one_adapter_is_always_linear() -> None:
    wrapped, updates = model(1)
    theirs = by_peft(wrapped, [0.5], combination_type="ties", density=0.3)
    assert_same(FUSIONS["peft-ties"].run(updates, [0.5], density=0.3), *theirs)


def test_linear_is_not_the_sum_of_updates_and_ours_is() -> None:
    _, updates = model(2)
    total = sum(u.dense() for u in updates)
    crossed = FUSIONS["peft-linear"].run(updates, [1.0, 1.0]).dense()
    assert np.linalg.norm(crossed - total) > 0.5 * np.linalg.norm(total)
    ours = FUSIONS["linear"].run(updates, [1.0, 1.0]).dense()
    assert np.linalg.norm(ours - total) <= CLOSE * np.linalg.norm(total)


def test_exact_concatenation_is_pefts_cat() -> None:
    wrapped, updates = model(3)
    b, a = by_peft(wrapped, [0.5, 0.25, -1.0], combination_type="cat")
    assert (
        np.abs(FUSIONS["linear"].run(updates, [0.5, 0.25, -1.0]).dense() - b @ a).max() <= CLOSE * np.abs(b @ a).max()
    )
