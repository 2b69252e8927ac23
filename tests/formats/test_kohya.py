"""kohya's grammar: scales to the last bit, metadata that are never stale, names with and without help."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratools as lt
from loratools.core.adapter import Adapter, Meta
from loratools.errors import FormatError, LoratoolsError, NameUnresolvedError, UnsupportedError
from loratools.formats.base import FORMATS
from loratools.formats.names import FAMILIES, Lookup, expanded, flat, renamed, shipped
from loratools.io.base import Base
from loratools.io.bundle import from_memory
from loratools.io.read import open_bundle
from loratools.kinds.dora import Dora
from loratools.kinds.lowrank import LowRank
from loratools.linalg.namespace import to_numpy

HOME = Path(__file__).parents[2] / "fixtures" / "formats"
STEM = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
KOHYA, LYCORIS, COMFY = FORMATS["kohya"], FORMATS["lycoris"], FORMATS["comfy"]


def pair(stem: str = STEM, alpha: Any = None, dtype: str = "float32", rank: int = 4) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    down, up = rng.standard_normal((rank, 16)).astype(dtype), rng.standard_normal((16, rank)).astype(dtype)
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    return tensors if alpha is None else {**tensors, f"{stem}.alpha": np.asarray(alpha, dtype)}


@pytest.mark.parametrize(
    ("alpha", "dtype", "scale"),
    [
        (None, "float32", 1.0),
        (2.0, "float32", 0.5),
        (0.3, "float16", float(np.float16(0.3)) / 4),  # rounded when it was stored
        (-2.0, "float32", -0.5),
        (0.0, "float32", 1.0),  # unset, to sd-scripts
    ],
)
def test_the_scale_is_what_sd_scripts_applies(alpha: Any, dtype: str, scale: float) -> None:
    tensors = pair(alpha=alpha, dtype=dtype)
    adapter = KOHYA.decode(from_memory(tensors))
    (u,) = adapter.values()
    assert isinstance(u, LowRank)
    assert u.scale == scale
    again = KOHYA.encode(adapter)
    assert {k: to_numpy(t).tobytes() for k, t in again.tensors.items()} == {k: v.tobytes() for k, v in tensors.items()}


def test_a_stored_zero_is_said_aloud_and_read_as_each_program_reads_it() -> None:
    kohya = KOHYA.decode(from_memory(pair(alpha=0.0)))
    assert any("alpha 0" in remark for remark in kohya.meta.remarks)
    comfy = COMFY.decode(from_memory(pair("diffusion_model.input_blocks.1.1.proj_in", alpha=0.0)))
    (u,) = comfy.values()
    assert isinstance(u, LowRank)
    assert u.scale == 0.0


@pytest.mark.parametrize("scale", [0.0, 1.0 / 3.0, 2.0**0.5, -1.5, 1e-4])
@pytest.mark.parametrize("name", ["kohya", "lycoris", "comfy"])
def test_any_scale_is_written_exactly(scale: float, name: str) -> None:
    rng = np.random.default_rng(0)
    u = LowRank(rng.standard_normal((16, 3)).astype("float16"), rng.standard_normal((3, 16)).astype("float16"), scale)
    adapter = Adapter({"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight": u}, Meta())
    bundle = FORMATS[name].encode(adapter)
    (again,) = FORMATS[name].decode(from_memory({k: to_numpy(t) for k, t in bundle.tensors.items()})).values()
    assert np.array_equal(again.dense(), u.dense()) or np.allclose(again.dense(), u.dense(), rtol=1e-15)


def test_every_program_reads_a_zero_scale_as_zero() -> None:
    u = LowRank(np.ones((4, 2)), np.ones((2, 4)), 0.0)
    adapter = Adapter({"unet.conv_in.weight": u}, Meta())
    bundle = KOHYA.encode(adapter)
    (alpha,) = [t for k, t in bundle.tensors.items() if k.endswith(".alpha")]
    assert float(alpha) != 0.0  # sd-scripts would read 0 as "unset"


def test_a_squeezed_file_says_its_new_figures_and_no_stale_hash(tmp_path: Path) -> None:
    adapter = lt.load(HOME / "kohya" / "sd15.safetensors")
    path = lt.save(lt.squeeze(adapter, rank=1), tmp_path / "x.safetensors")
    bundle = open_bundle(path)
    said = bundle.metadata
    assert said["ss_network_dim"] == "1"
    assert said["ss_training_comment"] == "three nights of work"
    assert said["modelspec.trigger_phrase"] == "a sks dog"
    assert "modelspec.thumbnail" in said
    assert "sshs_legacy_hash" not in said
    data = path.read_bytes()
    body = data[8 + int.from_bytes(data[:8], "little") :]
    assert said["sshs_model_hash"] == hashlib.sha256(body).hexdigest()


def test_unequal_ranks_are_dynamic(tmp_path: Path) -> None:
    adapter = lt.load(HOME / "kohya" / "sd15.safetensors")
    said = open_bundle(lt.save(lt.squeeze(adapter, energy=0.8), tmp_path / "x.safetensors")).metadata
    ranks = {u.rank for u in lt.load(tmp_path / "x.safetensors").values()}  # type: ignore[attr-defined]
    assert said["ss_network_dim"] == (str(ranks.pop()) if len(ranks) == 1 else "Dynamic")


def test_notes_travel_to_other_formats_and_hashes_do_not(tmp_path: Path) -> None:
    adapter = lt.load(HOME / "kohya" / "sd15.safetensors")
    for to in ("diffusers", "comfy", "lycoris"):
        said = open_bundle(lt.save(adapter, tmp_path / f"{to}.safetensors", format=to)).metadata
        assert said["modelspec.trigger_phrase"] == "a sks dog"
        assert not {"sshs_model_hash", "sshs_legacy_hash"} & said.keys()


def test_families_have_no_two_names_that_flatten_alike() -> None:
    paths = {p for family in FAMILIES.values() for template in family for p in expanded(template)}
    assert len({flat(p) for p in paths}) == len(paths)
    for path in paths:
        assert shipped()(flat(path.replace("#", "7"))) == path.replace("#", "7")


@pytest.mark.parametrize(
    "path",
    [
        "down_blocks.1.attentions.0.transformer_blocks.9.attn2.to_out.0",
        "input_blocks.4.1.transformer_blocks.0.ff.net.0.proj",
        "double_blocks.18.txt_attn.qkv",
        "single_transformer_blocks.37.proj_mlp",
        "model.layers.79.self_attn.o_proj",
        "roberta.encoder.layer.11.attention.output.dense",
        "encoder.block.0.layer.1.DenseReluDense.wi_0",
    ],
)
def test_common_names_need_no_base(path: str) -> None:
    assert shipped()(flat(path)) == path


def test_the_base_names_what_nobody_ships() -> None:
    stem = "lora_unet_blocks_0_cross_attn_q_proj_x"
    tensors = pair(stem)
    plain = KOHYA.decode(from_memory(tensors))
    assert list(plain) == [f"{stem}.weight"]
    with pytest.raises(NameUnresolvedError, match="--base"):
        COMFY.encode(plain)
    base = Base.open({"model.diffusion_model.blocks.0.cross_attn.q_proj_x.weight": np.zeros((16, 16), np.float32)})
    named = KOHYA.decode(from_memory(tensors), base=base)
    assert list(named) == ["diffusion_model.blocks.0.cross_attn.q_proj_x.weight"]
    assert KOHYA.encode(named).tensors.keys() == tensors.keys()


def test_two_names_that_flatten_alike_are_an_error_that_says_both() -> None:
    lookup = Lookup(["a.b_c", "a_b.c"], any_number=False)
    with pytest.raises(NameUnresolvedError, match=r"a\.b_c, a_b\.c"):
        lookup("a_b_c")


@pytest.mark.parametrize("rule", ["no equals sign", "=x", "(=x", r"(a)=\2"])
def test_rename_rules_are_checked(rule: str) -> None:
    with pytest.raises(LoratoolsError, match="--rename"):
        renamed(["a.b"], [rule])


def test_rename_may_not_join_names() -> None:
    with pytest.raises(LoratoolsError, match="one name"):
        renamed(["a1", "a2"], [r"\d="])
    assert renamed(["a.1.q", "b"], [r"^a\.(\d+)=m.\1"]) == {"a.1.q": "m.1.q", "b": "b"}


@pytest.mark.parametrize(
    ("leaf", "what"),
    [("oft_blocks", "OFT"), ("a1.weight", "GLoRA"), ("on_input", "IA3"), ("lambda_layer", "T-LoRA")],
)
def test_what_acts_on_the_base_is_recognised_and_named(leaf: str, what: str) -> None:
    bundle = from_memory({f"{STEM}.{leaf}": np.ones((2, 3, 3))})
    assert LYCORIS.declines(bundle) is None
    with pytest.raises(UnsupportedError, match=what):
        LYCORIS.decode(bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{STEM}.lora_up.weight": None}, "half of a factor pair"),
        ({f"{STEM}.lora_up.weight": np.ones((16, 5))}, "do not multiply"),
        ({f"{STEM}.alpha": np.ones(2)}, "not a single number"),
        ({f"{STEM}.alpha": np.float32("nan")}, "not finite"),
        ({f"{STEM}.lora_down.weight": np.ones((0, 16))}, "no elements"),
        ({f"{STEM}.dora_scale": np.ones(16)}, "axis"),
        ({f"{STEM}.lora_up.weight": np.ones((16, 4, 3, 3))}, "kernel on the up"),
    ],
)
def test_broken_modules_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    tensors = {k: v for k, v in {**pair(alpha=2.0), **change}.items() if v is not None}
    with pytest.raises(FormatError, match=message):
        KOHYA.decode(from_memory(tensors))


def test_magnitudes_of_both_axes_are_kept_and_the_input_axis_refused_elsewhere() -> None:
    adapter = lt.load(HOME / "kohya" / "sdxl-dora.safetensors")
    axes = {name.rpartition(".")[0].rpartition(".")[2]: u.axis for name, u in adapter.items() if isinstance(u, Dora)}
    assert axes == {"to_q": 0, "proj_in": 1}
    only = replace(adapter, updates={n: u for n, u in adapter.items() if n.endswith("proj_in.weight")})
    for to in ("diffusers", "peft"):
        with pytest.raises(LoratoolsError, match=r"input axis|place for this dora"):
            FORMATS[to].encode(lt.convert(only, to))


def test_a_bundle_carries_its_embeddings() -> None:
    adapter = lt.load(HOME / "comfy" / "flux.safetensors")
    assert list(adapter.meta.leftover) == ["bundle_emb.sks.clip_l"]
    assert any("bundle_emb" in remark for remark in adapter.meta.remarks)


def test_half_dotted_names_of_other_trainers_are_read() -> None:
    tensors = pair("lora_unet_up_blocks_1_attentions_1.transformer_blocks.1.attn1.to_q")
    bundle = from_memory(tensors)
    assert KOHYA.declines(bundle) is None
    adapter = KOHYA.decode(bundle)
    assert list(adapter) == ["unet.up_blocks.1.attentions.1.transformer_blocks.1.attn1.to_q.weight"]
    assert KOHYA.encode(adapter).tensors.keys() == tensors.keys()


@pytest.mark.parametrize("file", ["torchtune/adapter_model.pt", "cloneofsimo/tokens.safetensors", "gguf/llama.gguf"])
def test_names_that_nothing_resolved_reach_no_other_format(file: str, tmp_path: Path) -> None:
    """A number is no name, and rows in another order would be silent garbage."""
    adapter = lt.load(HOME / file)
    source = adapter if adapter.meta.scaled else lt.convert(adapter, "peft", scale=1.0)
    native = lt.load(lt.save(source, tmp_path / "n.safetensors", format="native"))
    for to in ("peft", "kohya", "mlx"):
        for told in (source, native):
            with pytest.raises(NameUnresolvedError):
                FORMATS[to].encode(told)
