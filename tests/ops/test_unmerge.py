from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from loratools.core.adapter import Adapter
from loratools.errors import FormatError, MismatchError, NeedsBaseError
from loratools.kinds.dora import Dora
from loratools.kinds.lowrank import LowRank
from loratools.kinds.replace import Replace
from loratools.ops.merge import merge
from loratools.ops.unmerge import unmerge

Model = Callable[..., Path]
Make = Callable[..., Adapter]


def weight(rng: Any, *shape: int) -> Any:
    return rng.standard_normal(shape).astype(np.float32).astype(ml_dtypes.bfloat16)


def low(rng: Any, m: int, n: int) -> LowRank:
    return LowRank(rng.standard_normal((m, 2)).astype(np.float32), rng.standard_normal((2, n)).astype(np.float32), 0.1)


def test_subtraction_comes_back_up_to_rounding(model: Model, adapter_of: Make, rng: Any, tmp_path: Path) -> None:
    w = weight(rng, 32, 16)
    base = model({"x.weight": w})
    a = adapter_of({"x.weight": low(rng, 32, 16)})
    merge(base, [a], tmp_path / "m", weights=[0.7])
    report = unmerge(tmp_path / "m", [a], tmp_path / "b", weights=[0.7])
    back = load_file(tmp_path / "b" / "model.safetensors")["x.weight"].astype(np.float64)
    x = load_file(tmp_path / "m" / "model.safetensors")["x.weight"].astype(np.float64)
    # two roundings to bf16 (8 bits), of numbers as large as the larger of both
    assert np.abs(back - w.astype(np.float64)).max() <= 2 * 2.0**-8 * max(np.abs(x).max(), np.abs(back).max())
    row = report.modules[0]
    merge(tmp_path / "b", [a], tmp_path / "again", weights=[0.7])
    again = load_file(tmp_path / "again" / "model.safetensors")["x.weight"].astype(np.float64)
    assert row["roundtrip_error"] == pytest.approx(np.linalg.norm(again - x), rel=1e-5)
    assert any("not exact" in line for line in report.warnings)


def test_dora_and_replacements_need_the_undo_file(model: Model, adapter_of: Make, rng: Any, tmp_path: Path) -> None:
    tensors = {"x.weight": weight(rng, 32, 16), "n.weight": weight(rng, 16), "c.weight": weight(rng, 4, 16)}
    base = model(tensors)
    dora = Dora(low(rng, 32, 16), (4 + rng.random(32)).astype(np.float32))
    a = adapter_of(
        {"x.weight": dora, "n.weight": Replace(np.ones(16, np.float32)), "new.weight": Replace(weight(rng, 2, 3))}
    )
    undo = tmp_path / "undo"
    merge(base, [a], tmp_path / "m", undo_file=undo)
    with pytest.raises(NeedsBaseError, match="3 of 3") as caught:
        unmerge(tmp_path / "m", [a], tmp_path / "b")
    assert "x.weight (dora)" in str(caught.value.got)
    assert not (tmp_path / "b").exists()
    unmerge(tmp_path / "m", [a], tmp_path / "b", undo_file=undo)
    back = load_file(tmp_path / "b" / "model.safetensors")
    assert set(back) == set(tensors)
    assert back["n.weight"].tobytes() == tensors["n.weight"].tobytes()
    gain = np.abs(tensors["x.weight"].astype(np.float64)).max()
    # rounding of the merged weights, divided by a gain near 1, and of the result
    assert (
        np.abs(back["x.weight"].astype(np.float64) - tensors["x.weight"].astype(np.float64)).max() <= 4 * 2.0**-8 * gain
    )


def test_several_adapters_with_their_weights_come_from_the_undo_file(
    model: Model, adapter_of: Make, rng: Any, tmp_path: Path
) -> None:
    tensors = {"x.weight": weight(rng, 32, 16)}
    base = model(tensors)
    pair = [
        adapter_of({"x.weight": low(rng, 32, 16)}),
        adapter_of({"x.weight": Dora(low(rng, 32, 16), np.full(32, 4, np.float32))}),
    ]
    merge(base, pair, tmp_path / "m", weights=[0.3, 0.6], undo_file=tmp_path / "undo")
    unmerge(tmp_path / "m", pair[::-1], tmp_path / "b", undo_file=tmp_path / "undo")
    assert load_file(tmp_path / "b" / "model.safetensors")["x.weight"].tobytes() == tensors["x.weight"].tobytes()
    with pytest.raises(MismatchError, match="other weights"):
        unmerge(tmp_path / "m", pair, tmp_path / "c", undo_file=tmp_path / "undo", weights=[1, 1])
    with pytest.raises(MismatchError, match="other adapters"):
        unmerge(tmp_path / "m", pair[:1], tmp_path / "c", undo_file=tmp_path / "undo")
    with pytest.raises(FormatError, match="no undo file"):
        unmerge(tmp_path / "m", pair, tmp_path / "c", undo_file=tmp_path / "m" / "model.safetensors")


def test_an_untied_head_goes_again(model: Model, adapter_of: Make, rng: Any, tmp_path: Path) -> None:
    base = model(
        {"model.embed_tokens.weight": weight(rng, 8, 4)}, architectures=["XForCausalLM"], tie_word_embeddings=True
    )
    a = adapter_of({"lm_head.weight": low(rng, 8, 4)})
    merge(base, [a], tmp_path / "m", untie=True, undo_file=tmp_path / "undo")
    unmerge(tmp_path / "m", [a], tmp_path / "b", undo_file=tmp_path / "undo")
    assert load_file(tmp_path / "b" / "model.safetensors").keys() == {"model.embed_tokens.weight"}
    assert json.loads((tmp_path / "b" / "config.json").read_text())["tie_word_embeddings"] is True
