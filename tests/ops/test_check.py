"""check and fix as functions: reports, unreadable files, extras moved aside."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import loratools as lt
from loratools.consumers.subject import read
from loratools.core.adapter import Adapter, Meta
from loratools.errors import ConversionError, FileError, LoratoolsError, NeedsBaseError, UsageError
from loratools.io.base import Base
from loratools.io.read import open_bundle
from loratools.kinds.dense import Dense
from loratools.kinds.dora import Dora
from loratools.kinds.lowrank import LowRank
from loratools.kinds.rebased import Rebased
from loratools.kinds.replace import Replace
from loratools.ops.check import check, items
from loratools.ops.fix import fix

HEAD = "model.layers.0.self_attn"


def adapter(**more: object) -> Adapter:
    rng = np.random.default_rng(0)
    b, a = rng.standard_normal((8, 2), np.float32), rng.standard_normal((2, 8), np.float32)
    updates = {f"{HEAD}.q_proj.weight": LowRank(b, a, 2.0), **more}
    return Adapter(updates, Meta(namespace="hf"))  # type: ignore[arg-type]


def test_several_files_and_consumers_make_one_report(tmp_path: Path) -> None:
    good = lt.save(adapter(), tmp_path / "good", format="peft")
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"hello")
    report = check([good, junk], ["vllm", "peft"])
    assert [c["ok"] for c in report.checks] == [True, True, False, False]
    assert report.total["files"] == 2
    assert report.total["passed"] == 2
    assert {row["id"] for row in report.extra["findings"] if row["level"] == "error"} == {
        "vllm/unreadable", "peft/unreadable"
    }  # fmt: skip
    assert json.loads(report.to_json())["schema"] == "loratools.check/1"
    assert {i.level for i in items(report)} <= {"error", "warning", "note"}


def test_one_unreadable_file_raises(tmp_path: Path) -> None:
    with pytest.raises(FileError):
        check(tmp_path / "nowhere", "peft")


def test_an_unknown_consumer_is_told(tmp_path: Path) -> None:
    good = lt.save(adapter(), tmp_path / "good", format="peft")
    with pytest.raises(UsageError, match="vlm") as caught:
        check(good, "vlm")
    assert "vllm" in str(caught.value)


def test_extras_move_aside_with_their_values(tmp_path: Path) -> None:
    norm = np.arange(8, dtype=np.float32)
    (tmp_path / "other.safetensors").write_bytes(b"")  # a neighbour: no config is written beside the extras
    source = lt.save(adapter(**{"model.norm.weight": Replace(norm)}), tmp_path / "a", format="native")
    done = fix(read(source), "vllm", tmp_path / "b")
    assert done.aside == tmp_path / "b-extras.safetensors"
    assert done.extras == ("model.norm.weight",)
    assert np.array_equal(lt.load(done.aside)["model.norm.weight"].apply(None), norm)
    assert list(lt.load(tmp_path / "b")) == [f"{HEAD}.q_proj.weight"]
    with pytest.raises(LoratoolsError, match="exists"):
        fix(read(source), "vllm", tmp_path / "b")


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    source = lt.save(adapter(), tmp_path / "a", format="native")
    assert fix(read(source), "vllm", tmp_path / "b", dry_run=True).steps
    assert not (tmp_path / "b").exists()


def test_full_differences_and_magnitudes_are_refused_by_name(tmp_path: Path) -> None:
    magnitude = Dora(LowRank(np.ones((8, 2), np.float32), np.ones((2, 8), np.float32)), np.ones(8, np.float32))
    source = lt.save(adapter(**{f"{HEAD}.k_proj.weight": magnitude}), tmp_path / "a", format="native")
    with pytest.raises(NeedsBaseError, match="dora"):
        fix(read(source), "vllm", tmp_path / "b")
    only = Adapter({f"{HEAD}.q_proj.weight": Dense(np.ones((8, 8), np.float32))}, Meta(namespace="hf"))
    with pytest.raises(ConversionError, match="nothing in the file"):
        fix(read(lt.save(only, tmp_path / "c", format="native")), "vllm", tmp_path / "d")
    assert not (tmp_path / "b").exists()


def test_modules_that_a_consumer_does_not_adapt_are_refused(tmp_path: Path) -> None:
    odd = LowRank(np.ones((8, 2), np.float32), np.ones((2, 8), np.float32))
    source = lt.save(adapter(**{"model.layers.0.mixer.in_proj.weight": odd}), tmp_path / "a", format="peft")
    assert "tgi/modules" in [row["id"] for row in check(source, "tgi").extra["findings"]]
    with pytest.raises(ConversionError, match="does not adapt"):
        fix(read(source), "tgi", tmp_path / "b")


@pytest.mark.parametrize("own", [True, False])
def test_an_embedding_that_is_the_bases_own_does_not_keep_its_update_from_the_consumer(
    own: bool, tmp_path: Path
) -> None:
    """PEFT saves an adapted head beside its factors: where nothing was changed in it, the factors are all there is."""
    rng = np.random.default_rng(1)
    head = rng.standard_normal((8, 6), np.float32)
    pair = LowRank(rng.standard_normal((8, 2), np.float32), rng.standard_normal((2, 6), np.float32))
    value = head if own else head + 1
    source = lt.save(adapter(**{"lm_head.weight": Rebased(value, pair)}), tmp_path / "a", format="native")
    base = Base.open({"lm_head.weight": head, f"{HEAD}.q_proj.weight": rng.standard_normal((8, 8), np.float32)})
    done = fix(read(source, base=base), "llama.cpp", tmp_path / "b.gguf", model_type="llama", heads=2, kv_heads=2)
    written = {key.rpartition(".")[0] for key in open_bundle(done.path).tensors}
    assert ("output.weight" in written) == own
    assert (done.aside is None) == own
    assert any("base's own" in step for step in done.steps) == own


def test_an_adapter_of_an_altered_base_is_made_plain_or_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    w = rng.standard_normal((8, 8)) * 2.0 ** -np.arange(8)
    u, s, vh = np.linalg.svd(w)
    learned = LowRank((u[:, :2] * s[:2] * 1.1).astype(np.float32), vh[:2].astype(np.float32))
    name = f"{HEAD}.q_proj.weight"

    def trained(init: str) -> Path:
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "init_lora_weights": init}
        made = Adapter({name: learned}, Meta(format="peft", namespace="hf", config=config))
        return lt.save(made, tmp_path / init, format="peft")

    base = Base.open({name: w.astype(np.float32)})
    done = fix(read(trained("pissa"), base=base), "vllm", tmp_path / "plain")
    assert any("original base" in step for step in done.steps)
    d = lt.load(tmp_path / "plain")[name].dense()  # type: ignore[attr-defined]
    assert np.abs(d - 0.1 * (u[:, :2] * s[:2]) @ vh[:2]).max() <= 1e-5  # fp32 factors ten times as large
    assert check(tmp_path / "plain", "vllm", base=base).checks[0]["ok"]
    for init, opened in (("pissa", None), ("corda", base)):
        with pytest.raises(ConversionError, match=f"{init} altered") as caught:
            fix(read(tmp_path / init if init == "pissa" else trained(init), base=opened), "vllm", tmp_path / "no")
        assert "loratools recover" in str(caught.value.hint)
    assert not (tmp_path / "no").exists()
