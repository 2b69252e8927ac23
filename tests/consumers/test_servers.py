"""Servers that cannot be run here: verdicts follow their sources, and what --fix writes means the same to PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratools as lt
from loratools.consumers import peft_reader
from loratools.consumers.ranks import LEGAL_RANKS
from loratools.consumers.subject import read
from loratools.errors import LoratoolsError
from loratools.io.base import Base
from loratools.kinds.lowrank import LowRank
from loratools.ops.check import check, judged
from loratools.ops.fix import fix

torch = pytest.importorskip("torch")

CLOSE = 1e-4  # fp32 logits of two layers; folding a scale rounds each entry of lora_B once
SERVERS = ("vllm", "sglang", "tgi", "tensorrt-llm")
READERS: dict[str, Callable[..., float]] = {
    "vllm": peft_reader.alpha_over_r_or_root,
    "sglang": peft_reader.alpha_over_r,
    "tgi": peft_reader.alpha_over_r_or_root,
    "tensorrt-llm": peft_reader.alpha_over_r_or_root,
}
# name: (options, server -> rules that must speak)
FAULTS: dict[str, tuple[dict[str, Any], dict[str, set[str]]]] = {
    "plain": ({"r": 8}, {}),
    "rslora": ({"r": 16, "use_rslora": True}, {"sglang": {"strength"}}),
    "patterns": (
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        {"vllm": {"patterns"}, "sglang": {"strength"}, "tgi": {"patterns"}, "tensorrt-llm": {"patterns"}},
    ),
    "dora": ({"use_dora": True}, {"vllm": {"dora"}, "sglang": {"dora"}, "tgi": {"dora"}}),
    "odd rank": ({"r": 12, "lora_alpha": 7}, {}),
    "one layer": ({"layers_to_transform": [1]}, {"tgi": {"gaps"}}),
    "saved": (
        {"modules_to_save": ["embed_tokens"]},
        {"vllm": {"modules-to-save"}, "tgi": {"modules-to-save"}},
    ),
}  # fmt: skip


def errors(folder: Path, server: str, base: Path | None = None) -> set[str]:
    opened = None if base is None else Base.open(base)
    found = judged(read(folder, base=opened), server)
    return {f.id.partition("/")[2] for f in found if f.level != "note"}


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("name", FAULTS)
def test_verdict_and_fix(name: str, server: str, llama: Any, tmp_path: Path) -> None:
    options, rules = FAULTS[name]
    reference = llama.adapter(tmp_path / "a", **options)
    before = errors(tmp_path / "a", server, llama.base)
    assert before == rules.get(server, set())
    if name == "dora" and server != "tensorrt-llm":
        with pytest.raises(LoratoolsError, match="merge"):
            fix(read(tmp_path / "a"), server, tmp_path / "b")
        assert not (tmp_path / "b").exists()
        return
    done = fix(read(tmp_path / "a"), server, tmp_path / "b")
    after = errors(tmp_path / "b", server, llama.base)
    assert after == ({"gaps"} & before)  # a layer that was not trained has no factors to write
    assert_reads_at_one_scale(tmp_path / "b", server)
    if done.aside is None:
        assert torch.allclose(llama.loaded(tmp_path / "b"), reference, atol=CLOSE)
    else:
        assert set(lt.load(done.aside)) == set(done.extras) == {"model.embed_tokens.weight"}


def assert_reads_at_one_scale(folder: Path, server: str) -> None:
    """A program that knows one alpha and one r gives every module the scale that the file means."""
    adapter = lt.load(folder)
    pairs = [u for u in adapter.values() if isinstance(u, LowRank)]
    for u in pairs:
        assert READERS[server](adapter.meta.config, u) == pytest.approx(u.scale, rel=1e-12)
        assert u.rank == adapter.meta.config["r"]
        assert server != "vllm" or u.rank in LEGAL_RANKS["vllm"]
    assert not adapter.meta.config.get("rank_pattern")
    assert not adapter.meta.config.get("alpha_pattern")


def test_a_uniform_scale_leaves_the_tensors_as_they_are(llama: Any, tmp_path: Path) -> None:
    llama.adapter(tmp_path / "a", r=16, use_rslora=True)
    fix(read(tmp_path / "a"), "sglang", tmp_path / "b")
    before, after = lt.load(tmp_path / "a"), lt.load(tmp_path / "b")
    for name, u in before.items():
        assert isinstance(u, LowRank)
        assert np.array_equal(u.b.read(), after[name].b.read())  # type: ignore[attr-defined]
    assert after.meta.config["lora_alpha"] == 32  # 8 / sqrt(16) * 16


def test_planted_keys(llama: Any, plant: Any, tmp_path: Path) -> None:
    llama.adapter(tmp_path / "a")
    plant(tmp_path / "a", lambda t: {k.replace(".weight", ".default.weight"): v for k, v in t.items()})
    assert errors(tmp_path / "a", "vllm") == {"adapter-name"}
    assert errors(tmp_path / "a", "tgi") >= {"adapter-name"}
    fix(read(tmp_path / "a"), "vllm", tmp_path / "b")
    assert errors(tmp_path / "b", "vllm") == set()


def test_rank_limits(llama: Any, tmp_path: Path) -> None:
    llama.adapter(tmp_path / "a", r=24)
    notes = {f.id for f in judged(read(tmp_path / "a"), "vllm") if f.level == "note"}
    assert {"vllm/rank-odd", "vllm/server-flag"} <= notes
    assert errors(tmp_path / "a", "vllm") == set()
    limited = {f.id for f in judged(read(tmp_path / "a", limit=16), "vllm") if f.level == "error"}
    assert limited == {"vllm/rank-limit"}


def test_altered_bases_and_other_types(llama: Any, plant: Any, tmp_path: Path) -> None:
    llama.adapter(tmp_path / "a")
    plant(tmp_path / "a", config=lambda c: {**c, "init_lora_weights": "pissa"})
    assert all("altered-base" in errors(tmp_path / "a", server) for server in SERVERS)
    plant(tmp_path / "a", config=lambda c: {**c, "peft_type": "LOHA"})
    assert all("type" in errors(tmp_path / "a", server) for server in SERVERS)


@pytest.mark.parametrize("server", SERVERS)
def test_names_are_mapped_onto_the_base(server: str, llama: Any, plant: Any, tmp_path: Path) -> None:
    reference = llama.adapter(tmp_path / "a")
    plant(tmp_path / "a", lambda t: {k.replace("model.layers", "model.language_model.layers"): v for k, v in t.items()})
    report = check(tmp_path / "a", server, base=llama.base)
    drift = next(row for row in report.extra["findings"] if row["id"] == f"{server}/prefix-drift")
    assert "0 of 4 modules" in drift["evidence"]
    assert "nearest: model.layers.0.mlp.down_proj" in drift["evidence"]
    fix(read(tmp_path / "a", base=Base.open(llama.base)), server, tmp_path / "b")
    assert errors(tmp_path / "b", server, llama.base) == set()
    assert torch.allclose(llama.loaded(tmp_path / "b"), reference, atol=CLOSE)
