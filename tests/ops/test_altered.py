from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loratools.core.adapter import Adapter, Meta
from loratools.core.update import Update
from loratools.errors import MismatchError, NeedsBaseError, NumericsError, UnsupportedError
from loratools.files import load, save
from loratools.kinds.dora import Dora
from loratools.kinds.lowrank import LowRank
from loratools.ops.altered import recover, refuse_altered

EPS = float(np.finfo(np.float32).eps)


def adapter(u: Update, init: Any, layout: str = "out_in") -> Adapter:
    return Adapter({"x.weight": u}, Meta(config={"init_lora_weights": init}, layout={"x.weight": {"stored": layout}}))


def pair(rng: Any) -> tuple[LowRank, LowRank]:
    """An initial product, and what little training made of it."""
    b, a = rng.standard_normal((20, 3)), rng.standard_normal((3, 16))
    step = 1e-3
    return LowRank(b, a, 2.0), LowRank(
        b + step * rng.standard_normal(b.shape), a + step * rng.standard_normal(a.shape), 2.0
    )


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq"])
def test_with_the_initial_adapter_it_is_exact(init: str, rng: Any) -> None:
    start, end = pair(rng)
    done = recover(adapter(end, init), initial=adapter(start, True))
    u = done["x.weight"]
    assert isinstance(u, LowRank)
    assert u.rank == 6
    d = end.dense() - start.dense()
    assert np.linalg.norm(u.dense() - d) <= 1e-12 * np.linalg.norm(start.dense())  # fp64 factors
    assert done.meta.config["init_lora_weights"] is True


def test_half_precision_does_not_cancel(rng: Any) -> None:
    """Side by side in bf16 the two products, a thousand times larger, leave little of the update; our factors all."""
    import ml_dtypes

    start, end = pair(rng)
    d = end.dense() - start.dense()
    half = recover(adapter(end, "pissa"), initial=adapter(start, True))["x.weight"]
    b, a = (x.astype(ml_dtypes.bfloat16).astype(np.float64) for x in (half.b, half.a))  # type: ignore[attr-defined]
    assert np.linalg.norm(b @ a - d) <= 2 * 2.0**-8 * np.linalg.norm(d)
    tall = np.concatenate([end.b, -start.b], axis=1).astype(ml_dtypes.bfloat16).astype(np.float64)
    wide = np.concatenate([end.a, start.a], axis=0).astype(ml_dtypes.bfloat16).astype(np.float64)
    assert np.linalg.norm(2 * tall @ wide - d) > 0.5 * np.linalg.norm(d)


def test_another_initial_adapter_is_noticed(rng: Any) -> None:
    start, end = pair(rng)
    other, zero = pair(rng)[0], LowRank(np.zeros((20, 3)), start.a, 2.0)
    right, wrong = (recover(adapter(end, "corda"), initial=adapter(u, True)).report for u in (start, other))
    assert right is not None
    assert wrong is not None
    assert not right.warnings
    assert any("is it of this training" in line for line in wrong.warnings)
    with pytest.raises(MismatchError, match="changes nothing"):
        recover(adapter(end, "corda"), initial=adapter(zero, True))


def test_a_dora_keeps_its_magnitude(rng: Any) -> None:
    start, end = pair(rng)
    m = rng.random(20) + 1
    done = recover(adapter(Dora(end, m), "pissa"), initial=adapter(start, True))["x.weight"]
    assert isinstance(done, Dora)
    assert np.array_equal(done.magnitude, m)


def test_refusals_say_why(rng: Any) -> None:
    start, end = pair(rng)
    for init, why in (
        ("corda", "training data"),
        ("lora_ga_v2", "training data"),
        ("pissa_niter_16", "randomised"),
        ("loftq", "quantiser"),
    ):
        with pytest.raises(UnsupportedError, match=why) as caught:
            recover(adapter(end, init), base={"x.weight": start.dense()})
        assert "--initial" in str(caught.value.hint)
    with pytest.raises(NeedsBaseError, match="pissa"):
        recover(adapter(end, "pissa"))
    with pytest.raises(UnsupportedError, match="original base already"):
        recover(adapter(end, True))
    kasa = Adapter({"x.weight": end}, Meta(config={"kasa_config": {"beta": 1}}))
    with pytest.raises(UnsupportedError, match="KaSA") as told:
        recover(kasa, initial=adapter(start, True))
    assert "--base" in str(told.value.hint)
    with pytest.raises(NeedsBaseError, match="kasa"):
        recover(kasa)
    for was in ("kasa", "pissa"):  # squeezed after training: the ranks of what was taken away are lost
        cut = Adapter({"x.weight": end}, Meta(config={"init_lora_weights": True, "loratools_altered_base": was}))
        with pytest.raises(UnsupportedError, match="ranks"):
            recover(cut, base={"x.weight": start.dense()})
        with pytest.raises(UnsupportedError, match="changed the base"):
            refuse_altered([cut], altered_base=False)
    with pytest.raises(MismatchError, match="does not have this module"):
        recover(adapter(end, "pissa"), initial=Adapter({"y.weight": start}))
    with pytest.raises(NumericsError, match="do not part"):  # equal singular values: any rotation is as good
        recover(adapter(end, "pissa"), base={"x.weight": np.eye(20, 16)})


@pytest.mark.parametrize(
    ("init", "by"), [("pissa", "base"), ("pissa", "initial"), ("olora", "base"), ("olora", "initial"), ("kasa", "base")]
)
def test_peft_says_the_same(init: str, by: str, make: Callable[..., Any], tmp_path: Path) -> None:
    """On the original base our plain LoRA gives what PEFT gives on the altered one."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    how = {"kasa_config": peft.KasaConfig()} if init == "kasa" else {"init_lora_weights": init}
    made = make("llama", r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], **how)
    expected = made.logits(made.model)
    raw = load(made.folder.rename(tmp_path / "final"), base=made.weights)
    if by == "base":
        done = recover(raw, base=made.weights)
    else:
        fresh = make("llama", r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])  # the same weights
        started = peft.get_peft_model(
            fresh.model.unload(),
            peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=init),
        )
        started.peft_config["default"].init_lora_weights = True
        started.save_pretrained(tmp_path / "initial")
        done = recover(raw, initial=load(tmp_path / "initial", base=made.weights))
    folder = save(done, tmp_path / "plain")
    plain = make("llama", r=4, target_modules=["q_proj"]).model.unload()
    loaded = peft.PeftModel.from_pretrained(plain, folder).eval()
    # PEFT computes the initial product in fp32; its error, a few eps of the weights, is multiplied by the depth
    assert torch.allclose(made.logits(loaded), expected, atol=1e-4 * float(expected.abs().max()))
    assert done.report is not None
    assert done.report.total["rank_after"] == 8
    assert not any("changed the base" in line for line in load(folder).meta.remarks)
