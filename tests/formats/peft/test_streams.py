"""Random numbers that files leave out: torch's and NumPy's, guarded by known numbers, asked for only where needed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from loratools.errors import MissingExtraError, UnsupportedError
from loratools.formats.peft import streams

torch = pytest.importorskip("torch", reason="torch is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

DRAWN = {
    "VeraConfig": {"r": 3, "save_projection": False},
    "PveraConfig": {"r": 3, "save_projection": False},
    "RandLoraConfig": {"r": 6, "save_projection": False},
    "TinyLoraConfig": {"r": 3, "u": 4, "save_projection": False},
    "FourierFTConfig": {"n_frequency": 9},
    "WaveFTConfig": {"n_frequency": 9},
}
SAVED = {
    "VeraConfig": {"r": 3},
    "PveraConfig": {"r": 3},
    "RandLoraConfig": {"r": 6},
    "TinyLoraConfig": {"r": 3, "u": 4},
    "UniLoraConfig": {"r": 2, "theta_d_length": 9},
    "LoKrConfig": {"r": 3},
}


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and torch cannot be imported any more."""
    return lambda: monkeypatch.setitem(sys.modules, "torch", None)


@pytest.mark.parametrize("config", DRAWN)
def test_without_torch_the_extra_and_the_alternative_are_named(
    config: str, oracle: Callable[..., Any], without_torch: Callable[[], None]
) -> None:
    made = oracle(config, ("down", "up"), **DRAWN[config])
    without_torch()
    with pytest.raises(MissingExtraError) as caught:
        made.read()
    assert "loratools[torch]" in str(caught.value)
    assert "save" in str(caught.value)


@pytest.mark.parametrize("config", SAVED)
def test_files_that_hold_their_numbers_need_no_torch(
    config: str, oracle: Callable[..., Any], without_torch: Callable[[], None]
) -> None:
    made = oracle(config, ("down", "up"), **SAVED[config])
    true = made.changes()
    without_torch()
    told = made.read_changes()
    for name, d in true.items():
        assert np.abs(told[name] - d).max() <= 1e-6 * max(np.abs(d).max(), 0.2)


@pytest.mark.parametrize("recipe", list(streams._KNOWN))
def test_other_numbers_are_refused(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = dict(streams._KNOWN)
    streams._need_known.cache_clear()
    streams._need_known(recipe)  # this version draws what it should
    streams._need_known.cache_clear()
    monkeypatch.setattr(streams, "_KNOWN", {**known, recipe: (*known[recipe][:3], known[recipe][3] + 1)})
    with pytest.raises(UnsupportedError, match="other random numbers"):
        streams._need_known(recipe)
    streams._need_known.cache_clear()


def test_permutations_that_cannot_be_checked_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="cannot be checked"):
        streams.Torch(0, "").permutation(streams.LARGEST)


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        ("VeraConfig", {"r": 3, "save_projection": False}),
        ("RandLoraConfig", {"r": 6, "save_projection": False}),
        ("TinyLoraConfig", {"r": 3, "u": 4, "save_projection": False}),
        ("UniLoraConfig", {"r": 2, "theta_d_length": 37}),
    ],
)
def test_a_base_of_half_precision_rounds_what_is_drawn(
    config: str, fields: dict[str, Any], oracle: Callable[..., Any], tmp_path: Any
) -> None:
    """PEFT moves projections and scales to the dtype of the base: a bf16 base changes them by up to 2^-9."""
    import loratools as lt
    from loratools.io.base import Base

    model = torch.nn.ModuleDict({"down": torch.nn.Linear(36, 24), "up": torch.nn.Linear(24, 36)}).to(torch.bfloat16)
    said = getattr(peft, config)(target_modules=["down", "up"], **fields)
    adapted = peft.get_peft_model(model, said).eval()
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) * 0.3)
    adapted.save_pretrained(tmp_path / "a")
    base = {k.replace("base_model.model.", "").replace("base_layer.", ""): v for k, v in adapted.state_dict().items()
            if "base_layer" in k}  # fmt: skip
    found = lt.load(tmp_path / "a", base=Base.open(base))
    for name in ("down", "up"):
        layer = adapted.base_model.model[name]
        true = layer.get_delta_weight("default").detach().double().numpy()
        if config == "TinyLoraConfig":  # PEFT rounds the core once more
            a, b, p = (getattr(layer, f"tinylora_{x}")["default"].double() for x in "ABP")
            v = layer.tinylora_v["default"][layer._tinylora_v_key["default"]].detach().double()
            true = (b @ (v[:, None, None] * p).sum(0) @ a).numpy()
        told = found[f"{name}.weight"].dense()
        assert np.abs(told - true).max() <= 1e-6 * np.abs(true).max()
