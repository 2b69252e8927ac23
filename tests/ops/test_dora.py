from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loratools.core.adapter import Adapter, Meta
from loratools.errors import MismatchError, NumericsError, UsageError
from loratools.files import load, save
from loratools.kinds.dora import Dora
from loratools.kinds.lowrank import LowRank
from loratools.ops.dora import to_dora, to_lora

EPS = float(np.finfo(np.float32).eps)


def low(rng: Any, m: int, n: int, scale: float = 0.5) -> LowRank:
    return LowRank(
        rng.standard_normal((m, 3)).astype(np.float32), rng.standard_normal((3, n)).astype(np.float32), scale
    )


def weight(rng: Any, *shape: int) -> Any:
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("stored", ["out_in", "in_out"])
def test_lora_to_dora_keeps_the_function(stored: str, rng: Any) -> None:
    w, u = weight(rng, 20, 30), low(rng, 20, 30)
    adapter = Adapter({"x.weight": u}, Meta(layout={"x.weight": {"path": "x", "stored": stored}}))
    done = to_dora(adapter, {"x.weight": w})["x.weight"]
    assert isinstance(done, Dora)
    assert done.axis == (1 if stored == "in_out" else 0)
    # gain 1 up to the rounding of a norm and of a quotient
    assert np.abs(done.apply(w) - u.apply(w)).max() <= 16 * EPS * np.abs(u.apply(w)).max()


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


def test_refusals(rng: Any) -> None:
    w, u = weight(rng, 6, 4), low(rng, 6, 4)
    with pytest.raises(MismatchError, match="another shape") as caught:
        to_dora(Adapter({"x.weight": u}), {"x.weight": weight(rng, 4, 6)})
    assert caught.value.parameter == "x.weight"
    with pytest.raises(NumericsError, match="row"):
        to_lora(Adapter({"x.weight": Dora(u, np.ones(6, np.float32))}), {"x.weight": -u.dense()})
    with pytest.raises(UsageError):
        to_lora(Adapter({"x.weight": u}), {"x.weight": w}, rank=0)


def test_peft_reads_a_converted_adapter(make: Callable[..., Any], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    made = make("llama", r=4, target_modules=["q_proj", "down_proj"])
    base = {name: np.asarray(w) for name, w in made.weights.items()}
    expected = made.logits(made.model)
    folder = save(to_dora(load(made.folder, base=base), base), tmp_path / "dora")
    loaded = peft.PeftModel.from_pretrained(made.model.unload(), folder).eval()
    assert loaded.peft_config["default"].use_dora
    assert torch.allclose(made.logits(loaded), expected, atol=1e-5 * float(expected.abs().max()))
