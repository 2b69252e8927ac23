from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loratools.core.adapter import Adapter, Meta
from loratools.errors import ConversionError, MismatchError, NeedsBaseError
from loratools.files import load, save
from loratools.kinds.dense import Dense
from loratools.kinds.dora import Dora
from loratools.kinds.hadamard import Hadamard
from loratools.kinds.lowrank import LowRank
from loratools.kinds.rebased import Rebased
from loratools.kinds.replace import Replace
from loratools.ops.types.dora import to_dora

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


def test_other_kinds(rng: Any) -> None:
    """A LoHa has exact factors; a sum of formed differences has none; a bias and a whole head are carried."""
    w, u = weight(rng, 5, 7), Hadamard.example(0)
    head, bias = Replace(weight(rng, 3, 2)), Dense(weight(rng, 5))
    done = to_dora(Adapter({"x.weight": u, "head.weight": head, "x.bias": bias}), {"x.weight": w})
    assert done["head.weight"] is head
    assert done["x.bias"] is bias
    assert np.abs(done["x.weight"].apply(w) - u.apply(w)).max() <= 16 * EPS * np.abs(u.apply(w)).max()
    with pytest.raises(ConversionError, match="no factors") as caught:
        to_dora(Adapter({"x.weight": Dense(weight(rng, 5, 7))}), {"x.weight": w})
    assert caught.value.parameter == "x.weight"


def test_an_embedding_that_comes_along_is_its_own_base(rng: Any) -> None:
    value, u = weight(rng, 9, 4), low(rng, 9, 4)
    done = to_dora(Adapter({"e.weight": Rebased(value, u)}))["e.weight"]
    assert isinstance(done, Rebased)
    assert isinstance(done.update, Dora)
    assert np.abs(done.apply(None) - Rebased(value, u).apply(None)).max() <= 1e-5


def test_refusals(rng: Any) -> None:
    w, u = weight(rng, 6, 4), low(rng, 6, 4)
    with pytest.raises(MismatchError, match="another shape"):
        to_dora(Adapter({"x.weight": u}), {"x.weight": w.T})
    with pytest.raises(NeedsBaseError) as caught:
        to_dora(Adapter({"x.weight": u}))
    assert caught.value.parameter == "x.weight"


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
