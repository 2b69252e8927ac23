"""What was held whole or refused: DoRA on columns, embeddings that the adapter brings along, unknown scales."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from loratools.core.adapter import Adapter
from loratools.core.update import Update
from loratools.errors import MismatchError, MissingScaleError
from loratools.kinds.dora import Dora
from loratools.kinds.lowrank import LowRank
from loratools.kinds.rebased import Rebased
from loratools.ops import rewrite
from loratools.ops.merge import merge
from loratools.ops.unmerge import unmerge

Model = Callable[..., Path]
Make = Callable[..., Adapter]
EPS = float(np.finfo(np.float32).eps)
NAME = "model.embed_tokens.weight"


def low(rng: Any, m: int, n: int) -> LowRank:
    return LowRank(rng.standard_normal((m, 2)).astype(np.float32), rng.standard_normal((2, n)).astype(np.float32), 0.5)


def weight(rng: Any, *shape: int) -> Any:
    return rng.standard_normal(shape).astype(np.float32)


def on_columns(rng: Any, w: Any) -> Dora:
    m, n = w.shape
    return Dora(low(rng, m, n), (np.linalg.norm(w, axis=0) * (1 + 0.1 * rng.random(n))).astype(np.float32), 1)


def test_columns_in_blocks(
    model: Model, adapter_of: Make, rng: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of a few rows, in several threads, give what the whole parameter gives, beside another adapter, too."""
    monkeypatch.setattr(rewrite, "RANGE_BYTES", 2048)
    monkeypatch.setattr(rewrite, "BLOCK", 256)
    w = weight(rng, 200, 16)
    base = model({NAME: w, "x.weight": weight(rng, 4, 4)})
    one, two = on_columns(rng, w), low(rng, 200, 16)
    report = merge(base, [adapter_of({NAME: one}), adapter_of({NAME: two})], tmp_path / "out", weights=[0.5, 2.0])
    expected = w + 0.5 * (one.apply(w) - w) + 2 * two.dense()
    assert (
        np.abs(load_file(tmp_path / "out" / "model.safetensors")[NAME] - expected).max() <= 64 * EPS * np.abs(w).max()
    )
    assert report.total["magnitude_agreement"] > 0.2
    merge(base, [adapter_of({NAME: one})], tmp_path / "alone", undo_file=tmp_path / "undo.safetensors")
    unmerge(tmp_path / "alone", [adapter_of({NAME: one})], tmp_path / "back", undo_file=tmp_path / "undo.safetensors")
    assert np.array_equal(load_file(tmp_path / "back" / "model.safetensors")[NAME], w)


def test_columns_take_blocks_of_memory(model: Model, adapter_of: Make, rng: Any, tmp_path: Path) -> None:
    """A parameter of 64 MB in fp32: as a whole it took more than five times its size."""
    w = weight(rng, 1 << 17, 128)
    base, adapter = model({NAME: w}), adapter_of({NAME: on_columns(rng, w)})
    tracemalloc.start()
    merge(base, [adapter], tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < w.nbytes


@pytest.mark.parametrize("coat", [False, True])
@pytest.mark.parametrize("rows", [12, 9])
def test_an_embedding_of_another_vocabulary(
    coat: bool, rows: int, model: Model, adapter_of: Make, rng: Any, tmp_path: Path
) -> None:
    """W' = update(value): the adapter's own embedding, whatever the base stores."""
    value = weight(rng, rows, 6)
    inner: Update = on_columns(rng, value) if coat else low(rng, rows, 6)
    before = {NAME: weight(rng, 9, 6), "lm_head.weight": weight(rng, 9, 6)}
    base = model(before, vocab_size=9, tie_word_embeddings=False, architectures=["XForCausalLM"])
    adapter = adapter_of({NAME: Rebased(value, inner)})
    report = merge(base, [adapter], tmp_path / "out", undo_file=tmp_path / "undo.safetensors")
    out = load_file(tmp_path / "out" / "model.safetensors")[NAME]
    assert np.abs(out - inner.apply(value)).max() <= 32 * EPS * np.abs(value).max()
    assert report.modules[0]["kind"] == "rebased"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == rows
    unmerge(tmp_path / "out", [adapter], tmp_path / "back", undo_file=tmp_path / "undo.safetensors")
    assert np.array_equal(load_file(tmp_path / "back" / "model.safetensors")[NAME], before[NAME])


def test_a_head_that_was_tied_to_it_gets_the_embedding_before_its_update(
    model: Model, adapter_of: Make, rng: Any, tmp_path: Path
) -> None:
    """PEFT wraps the input embedding alone; the head goes on with the resized tensor under it."""
    value = weight(rng, 12, 6)
    base = model({NAME: weight(rng, 9, 6)}, vocab_size=9, tie_word_embeddings=True, architectures=["XForCausalLM"])
    adapter = adapter_of({NAME: Rebased(value, low(rng, 12, 6))})
    with pytest.raises(MismatchError, match="ties"):
        merge(base, [adapter], tmp_path / "out")
    merge(base, [adapter], tmp_path / "out", untie=True)
    assert np.array_equal(load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"], value)


def test_two_embeddings_of_other_sizes_are_refused(model: Model, adapter_of: Make, rng: Any, tmp_path: Path) -> None:
    base = model({NAME: weight(rng, 9, 6)})
    brought = adapter_of({NAME: Rebased(weight(rng, 12, 6), low(rng, 12, 6))})
    with pytest.raises(MismatchError, match="another shape"):
        merge(base, [brought, adapter_of({NAME: low(rng, 9, 6)})], tmp_path / "out")
    with pytest.raises(MismatchError, match="another shape"):
        merge(base, [brought], tmp_path / "out", weights=[0.5])


def test_an_unknown_scale_is_refused_or_given(model: Model, adapter_of: Make, rng: Any, tmp_path: Path) -> None:
    w, u = weight(rng, 9, 6), low(rng, 9, 6)
    base, adapter = model({"x.weight": w}), adapter_of({"x.weight": u})
    silent = replace(adapter, meta=replace(adapter.meta, scaled=False, remarks=("the scale is unknown",)))
    with pytest.raises(MissingScaleError, match="how strongly") as caught:
        merge(base, [silent], tmp_path / "out")
    assert "--weights" in str(caught.value.hint)
    with pytest.raises(MissingScaleError):
        unmerge(base, [silent], tmp_path / "out")
    report = merge(base, [silent], tmp_path / "out", weights=[4.0])
    assert "the scale is unknown" in report.warnings
    merged = load_file(tmp_path / "out" / "model.safetensors")["x.weight"]
    assert np.allclose(merged, w + 4 * u.dense(), atol=1e-5)
