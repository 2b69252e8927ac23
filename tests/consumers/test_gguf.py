"""GGUF: the official reader finds PEFT's deltas at llama.cpp's scale; planted faults are those its loader names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratools as lt
from loratools.consumers.subject import read
from loratools.io.base import Base
from loratools.io.gguf import write_gguf
from loratools.io.read import open_bundle
from loratools.kinds.lowrank import low_rank
from loratools.linalg.namespace import to_numpy
from loratools.ops.check import check, judged
from loratools.ops.fix import fix

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
EPS = float(np.finfo(np.float32).eps)


def bad(path: Path, base: Path | None = None, consumer: str = "llama.cpp") -> set[str]:
    opened = None if base is None else Base.open(base)
    return {f.id.partition("/")[2] for f in judged(read(path, base=opened), consumer) if f.level == "error"}


def deltas(path: Path) -> dict[str, Any]:
    """Return stem -> the update as llama.cpp applies it: alpha / rank of the tensor, or 1 for alpha 0."""
    reader = gguf.GGUFReader(path)
    alpha = float(reader.get_field("adapter.lora.alpha").contents())
    tensors = {t.name: np.asarray(t.data, np.float64) for t in reader.tensors}
    stems = {name[:-7] for name in tensors}
    return {
        s: (alpha / tensors[f"{s}.lora_b"].shape[1] if alpha else 1.0) * tensors[f"{s}.lora_b"] @ tensors[f"{s}.lora_a"]
        for s in stems
    }


def interleaved(delta: Any, heads: int) -> Any:
    """Return the rows as llama.cpp's rotary layout wants them: the halves of each head alternate."""
    out, width = delta.shape
    return delta.reshape(heads, 2, out // heads // 2, width).swapaxes(1, 2).reshape(out, width)


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}}]
)
@pytest.mark.parametrize("consumer", ["llama.cpp", "ollama"])
def test_fix_writes_the_same_deltas(consumer: str, options: Any, llama: Any, tmp_path: Path) -> None:
    llama.adapter(tmp_path / "a", **options)
    named = {"llama.cpp": "converter-strength", "ollama": "strength"}[consumer]
    assert (named in bad(tmp_path / "a", llama.base, consumer)) == bool(options)
    out = tmp_path / "a.gguf"
    fix(read(tmp_path / "a", base=Base.open(llama.base)), consumer, out)
    assert check(out, consumer, base=llama.base).checks[0]["ok"]
    got = deltas(out)
    for name, u in lt.load(tmp_path / "a").items():
        pair = low_rank(u)
        assert pair is not None
        wanted = pair.scale * to_numpy(pair.b).astype(np.float64) @ to_numpy(pair.a).astype(np.float64)
        layer, kind = name.split(".")[2], name.split(".")[-2]
        if kind == "q_proj":
            wanted = interleaved(wanted, 4)
        stem = f"blk.{layer}.{ {'q_proj': 'attn_q', 'down_proj': 'ffn_down'}[kind] }.weight"
        # one rounding of each entry of b where the scale is folded in
        assert np.abs(got[stem] - wanted).max() <= 4 * EPS * pair.rank * np.abs(wanted).max()


FAULTS: dict[str, tuple[str, Any]] = {
    "types": ("types", lambda t, m: (t, m | {"general.type": "model"})),
    "suffix": ("suffix", lambda t, m: (t | {"blk.0.attn_q.bias": next(iter(t.values()))}, m)),
    "half": ("half-pairs", lambda t, m: (dict(list(t.items())[1:]), m)),
    "norms": ("norms", lambda t, m: (t | {"blk.0.attn_norm.weight": next(iter(t.values()))}, m)),
    "another layer": ("missing-modules", lambda t, m: ({k.replace("blk.1.", "blk.7."): x for k, x in t.items()}, m)),
    "other names": ("prefix-drift", lambda t, m: ({k.replace("blk.", "block."): x for k, x in t.items()}, m)),
    "architecture": ("architecture", lambda t, m: (t, m | {"general.architecture": "qwen2"})),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults(name: str, llama: Any, tmp_path: Path) -> None:
    rule, plant = FAULTS[name]
    llama.adapter(tmp_path / "a")
    fix(read(tmp_path / "a", base=Base.open(llama.base)), "llama.cpp", tmp_path / "a.gguf")
    bundle = open_bundle(tmp_path / "a.gguf")
    tensors, metadata = plant(dict(bundle.tensors), dict(bundle.metadata))
    write_gguf(tmp_path / "b.gguf", tensors, metadata)
    if name == "types":
        assert bad(tmp_path / "b.gguf", llama.base) == {"format"}
    else:
        assert rule in bad(tmp_path / "b.gguf", llama.base)


def test_norms_and_stray_tensors_go_when_the_file_is_written_again(llama: Any, tmp_path: Path) -> None:
    llama.adapter(tmp_path / "a")
    base = Base.open(llama.base)
    fix(read(tmp_path / "a", base=base), "llama.cpp", tmp_path / "a.gguf")
    bundle = open_bundle(tmp_path / "a.gguf")
    stray = next(iter(bundle.tensors.values()))
    write_gguf(tmp_path / "b.gguf", {**bundle.tensors, "blk.0.attn_norm.weight": stray}, bundle.metadata)
    done = fix(read(tmp_path / "b.gguf", base=base), "llama.cpp", tmp_path / "c.gguf")
    assert done.extras == ("blk.0.attn_norm.weight",)
    assert bad(tmp_path / "c.gguf", llama.base) == set()
    first, last = deltas(tmp_path / "a.gguf"), deltas(tmp_path / "c.gguf")
    assert first.keys() == last.keys()
    assert all(np.array_equal(first[stem], last[stem]) for stem in first)


def test_ollama_converts_two_architectures_only(llama: Any, tmp_path: Path) -> None:
    llama.adapter(tmp_path / "a")
    assert "architecture" not in bad(tmp_path / "a", llama.base, "ollama")
    other = tmp_path / "base"
    other.mkdir()
    for file in llama.base.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    said = json.loads((other / "config.json").read_text()) | {"model_type": "qwen2"}
    (other / "config.json").write_text(json.dumps(said))
    assert "architecture" in bad(tmp_path / "a", other, "ollama")


def test_a_base_of_which_no_names_are_known_is_no_reason(llama: Any, tmp_path: Path) -> None:
    llama.adapter(tmp_path / "a")
    fix(read(tmp_path / "a", base=Base.open(llama.base)), "llama.cpp", tmp_path / "a.gguf")
    other = Base({}, config={"model_type": "unheard_of"})
    found = judged(read(tmp_path / "a.gguf", base=other), "llama.cpp")
    assert not {f.id for f in found} & {"llama.cpp/prefix-drift", "llama.cpp/missing-modules"}
