"""convert: the cheapest exact route, loss only when allowed and then measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import loratools as lt
from loratools.cli.convert import command
from loratools.core.adapter import Adapter, Meta
from loratools.core.update import Delta
from loratools.errors import ConversionError, LoratoolsError, NeedsBaseError, UsageError
from loratools.io.base import Base
from loratools.kinds.dense import Dense
from loratools.kinds.dora import Dora
from loratools.kinds.hadamard import Hadamard
from loratools.kinds.kronecker import Kronecker
from loratools.kinds.lowrank import LowRank
from loratools.kinds.replace import Replace
from loratools.kinds.tucker import Tucker

HOME = Path(__file__).parents[2] / "fixtures"
NAME = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"


def one(u: Any, name: str = NAME) -> Adapter:
    return Adapter({name: u}, Meta())


@pytest.mark.parametrize("kind", [Hadamard, Kronecker, Tucker])
def test_exact_kinds_become_factors_without_loss(kind: Any) -> None:
    u = kind.example(1)
    done = lt.convert(one(u), "diffusers")
    v = done[NAME]
    assert isinstance(v, LowRank)
    assert np.allclose(v.dense(), u.dense(), atol=1e-6 * np.abs(u.dense()).max())
    assert done.report is not None
    (row,) = done.report.modules
    assert row["route"] == f"{u.kind} -> lowrank"
    assert row["relative_error"] == 0.0


def test_ranks_are_the_products() -> None:
    rng = np.random.default_rng(0)
    half = [LowRank(rng.standard_normal((6, r)), rng.standard_normal((r, 5))) for r in (2, 3)]
    assert lt.convert(one(Hadamard(*half)), "peft")[NAME].rank == 6  # type: ignore[attr-defined]
    assert lt.convert(one(Kronecker(*half)), "peft")[NAME].rank == 6  # type: ignore[attr-defined]


def test_what_needs_no_change_is_not_touched() -> None:
    u = LowRank.example(1)
    done = lt.convert(one(u), "kohya")
    assert done[NAME] is u


def test_loss_is_refused_then_measured() -> None:
    rng = np.random.default_rng(0)
    spectrum = np.diag(0.5 ** np.arange(12.0))
    q, _ = np.linalg.qr(rng.standard_normal((12, 12)))
    u = Dense((q @ spectrum @ q.T).astype(np.float32))
    with pytest.raises(ConversionError, match="--lossy would go dense -> lowrank"):
        lt.convert(one(u), "kohya")
    done = lt.convert(one(u), "kohya", lossy=True)
    v = done[NAME]
    assert isinstance(v, LowRank)
    assert done.report is not None
    told = done.report.modules[0]["relative_error"]
    true = np.linalg.norm(v.dense() - u.dense()) / np.linalg.norm(u.dense())
    assert told == pytest.approx(true, rel=1e-3)
    assert 0 < true <= 0.01
    assert "with loss" in done.meta.history[-1]


def test_a_coat_becomes_the_difference_on_its_base() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((6, 5)).astype(np.float32)
    u = Dora(LowRank(rng.standard_normal((6, 2)), rng.standard_normal((2, 5))), np.abs(rng.standard_normal(5)), axis=1)
    with pytest.raises(NeedsBaseError, match="--base"):
        lt.convert(one(u), "diffusers")
    base = Base.open({NAME.removeprefix("unet."): w})
    done = lt.convert(one(u), "diffusers", base=base, lossy=True)
    v = done[NAME]
    assert isinstance(v, LowRank)
    assert np.linalg.norm(v.apply(w) - u.apply(w)) <= 0.011 * np.linalg.norm(u.apply(w) - w)
    kept = lt.convert(one(u), "lycoris")
    assert kept[NAME] is u  # kohya's family knows both axes


def test_a_coat_over_other_kinds_keeps_its_magnitude() -> None:
    u = Dora(Hadamard.example(1), np.ones(5, np.float32))
    done = lt.convert(one(u), "diffusers")[NAME]
    assert isinstance(done, Dora)
    assert isinstance(done.direction, LowRank)
    w = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    assert np.allclose(done.apply(w), u.apply(w), atol=1e-5)


def test_what_has_no_place_is_named_then_left_out() -> None:
    adapter = Adapter({NAME: LowRank.example(1), "unet.classifier.weight": Replace(np.ones((2, 2)))}, Meta())
    with pytest.raises(LoratoolsError, match=r"classifier") as caught:
        lt.convert(adapter, "kohya")
    assert "--lossy" in str(caught.value)
    done = lt.convert(adapter, "kohya", lossy=True)
    assert list(done) == [NAME]
    assert done.report is not None
    assert "left out" in done.report.warnings[0]


def test_a_scale_is_taken_only_where_none_is_said() -> None:
    with pytest.raises(UsageError, match="says its scale"):
        lt.convert(one(LowRank.example(1)), "kohya", scale=2.0)


def test_split_qkv_is_reported_and_scaled_only_on_request() -> None:
    rng = np.random.default_rng(0)
    b = np.zeros((48, 6), np.float32)
    for i in range(3):
        b[16 * i : 16 * (i + 1), 2 * i : 2 * (i + 1)] = rng.standard_normal((16, 2))
    u = LowRank(b, rng.standard_normal((6, 16)).astype(np.float32), 0.5)
    name = "diffusion_model.double_blocks.0.img_attn.qkv.weight"
    adapter = Adapter({name: u}, Meta(format="kohya"))
    plain = lt.convert(adapter, "diffusers")
    assert plain.report is not None
    assert "split_qkv" in plain.report.warnings[0]
    assert plain[name].scale == 0.5  # type: ignore[attr-defined]
    assumed = lt.convert(adapter, "diffusers", split_alpha=True)
    assert assumed[name].scale == 1.5  # type: ignore[attr-defined]
    full = LowRank(rng.standard_normal((48, 6)), rng.standard_normal((6, 16)))
    quiet = lt.convert(Adapter({name: full}, Meta(format="kohya")), "diffusers")
    assert quiet.report is not None
    assert not quiet.report.warnings


def run(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(command, [str(a) for a in args], standalone_mode=False)
    if isinstance(result.exception, LoratoolsError):
        return 2, str(result.exception)
    assert result.exception is None, result.exception
    return int(result.return_value or 0), result.output


def test_explain_shows_routes_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    code, text = run(HOME / "formats/lycoris/mixed.safetensors", "--to", "kohya", "--lossy", "--explain", "-o", out)
    assert code == 0
    assert "tucker -> lowrank" in text
    assert "dora(hadamard) -> dora(lowrank)" in text
    assert "kronecker -> lowrank" in text
    assert not out.exists()


def test_a_command_line_there_and_back(tmp_path: Path) -> None:
    source = HOME / "formats/kohya/sd15.safetensors"
    assert run(source, "--to", "diffusers", "-o", tmp_path / "d.safetensors", "-q")[0] == 0
    assert run(tmp_path / "d.safetensors", "--to", "kohya", "-o", tmp_path / "k.safetensors", "-q")[0] == 0
    first, last = lt.load(source), lt.load(tmp_path / "k.safetensors")
    assert set(first) == set(last)
    for name, u in first.items():
        assert isinstance(u, Delta)
        assert np.allclose(last[name].dense(), u.dense(), rtol=1e-12)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("settings", "message"),
    [(["nonsense=1"], "no option"), (["bake=perhaps"], "true or false"), (["bake"], "no option")],
)
def test_settings_are_typed(settings: list[str], message: str) -> None:
    source = HOME / "formats/kohya/sd15.safetensors"
    code, text = run(source, "--to", "diffusers", *(x for s in settings for x in ("--set", s)))
    assert code == 2
    assert message in text


def test_the_report_is_data(tmp_path: Path) -> None:
    source = HOME / "formats/kohya/sd15.safetensors"
    code, text = run(source, "--to", "comfy", "-o", tmp_path / "c.safetensors", "--json")
    said = json.loads(text)
    assert code == 0
    assert said["schema"] == "loratools.convert/1"
    assert said["total"]["routes"] == {"lowrank": 5}
    assert {"kind_before", "kind_after", "route", "relative_error"} <= said["modules"][0].keys()


def test_help_lists_the_writers_options() -> None:
    text = CliRunner().invoke(command, ["--help"]).output
    assert "bake=false" in text
    assert "kv_heads=0" in text


def test_a_config_alone_is_base_enough_for_gguf(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    source = HOME / "formats/gguf/llama.gguf"
    config = HOME / "formats/gguf/config.json"
    assert run(source, "--to", "peft", "--base", config, "-o", tmp_path / "p", "-q")[0] == 0
    assert run(tmp_path / "p", "--to", "gguf", "--base", config, "-o", tmp_path / "x.gguf", "-q")[0] == 0
    first, last = lt.load(source), lt.load(tmp_path / "x.gguf")
    for name, u in first.items():
        assert np.allclose(last[name].dense(), u.dense(), rtol=1e-6)  # type: ignore[attr-defined]


def test_default_outputs_lie_beside_the_input(tmp_path: Path) -> None:
    import shutil

    shutil.copytree(HOME / "formats/mlx/dora", tmp_path / "dora")
    assert run(tmp_path / "dora", "--to", "peft", "-q")[0] == 0
    assert (tmp_path / "dora-peft" / "adapter_config.json").exists()
    assert run(tmp_path / "dora-peft", "--to", "kohya", "-q")[0] == 0
    assert (tmp_path / "dora-peft-kohya.safetensors").exists()
