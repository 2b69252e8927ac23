"""diffusers itself loads what we write, on tiny models built from configs, and applies the same update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratools as lt
from loratools.core.adapter import Adapter, Meta
from loratools.formats.base import FORMATS
from loratools.formats.spaces import ready
from loratools.io.bundle import from_memory
from loratools.kinds.dora import Dora
from loratools.kinds.lowrank import LowRank
from loratools.linalg.namespace import to_numpy

torch = pytest.importorskip("torch", reason="torch is not installed")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("peft", reason="peft is not installed")


def sd15() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=2, sample_size=8, in_channels=4, out_channels=4, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12, attention_head_dim=4,
    ).eval()  # fmt: skip


def sdxl() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16, 16), layers_per_block=2, sample_size=8, in_channels=4, out_channels=4,
        norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=12,
        attention_head_dim=4, transformer_layers_per_block=(1, 2, 2), use_linear_projection=True,
    ).eval()  # fmt: skip


def flux() -> Any:
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=24, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip


def pipeline(kind: str) -> Any:
    scheduler = diffusers.DDIMScheduler()
    none = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    two = {**none, "text_encoder_2": None, "tokenizer_2": None}
    if kind == "sd15":
        more = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return diffusers.StableDiffusionPipeline(unet=sd15(), scheduler=scheduler, **none, **more)
    if kind == "sdxl":
        return diffusers.StableDiffusionXLPipeline(unet=sdxl(), scheduler=scheduler, **two)
    return diffusers.FluxPipeline(transformer=flux(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), **two)


def model_of(pipe: Any) -> Any:
    return pipe.transformer if hasattr(pipe, "transformer") else pipe.unet


def run(kind: str, model: Any) -> Any:
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        if kind == "flux":
            ids = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(3.0), torch.arange(4.0), indexing="ij"), -1)
            return model(
                hidden_states=torch.randn(1, 12, 4, generator=g), timestep=torch.tensor([0.5]),
                encoder_hidden_states=torch.randn(1, 5, 24, generator=g),
                pooled_projections=torch.randn(1, 24, generator=g),
                txt_ids=torch.zeros(5, 3), img_ids=ids.reshape(12, 3), guidance=None,
            ).sample  # fmt: skip
        return model(
            torch.randn(1, 4, 8, 8, generator=g), torch.tensor([3]),
            encoder_hidden_states=torch.randn(1, 5, 12, generator=g),
        ).sample  # fmt: skip


def adapter_for(model: Any, component: str, *, convs: bool, dora: bool = False) -> Adapter:
    """Random updates of unequal ranks and scales on every attention, MLP and (if asked) convolution weight."""
    rng = np.random.default_rng(1)
    updates: dict[str, Any] = {}
    for i, (name, parameter) in enumerate(model.named_parameters()):
        shape = tuple(parameter.shape)
        wanted = (
            ".to_" in name
            or ".add_" in name
            or ".ff" in name
            or "proj" in name
            or "norm.linear" in name
            or "norm_out" in name
        )
        if not name.endswith(".weight") or len(shape) < 2 or not (wanted or (convs and len(shape) == 4)):
            continue
        r = 2 + i % 3
        b = rng.standard_normal((shape[0], r)).astype(np.float32) * 0.1
        a = rng.standard_normal((r, int(np.prod(shape[1:])))).astype(np.float32) * 0.1
        u: Any = LowRank(b, a, (0.5, 1.0, 2.0)[i % 3], shape)
        if dora:
            norms = np.linalg.norm(parameter.detach().numpy().reshape(shape[0], -1), axis=1)
            u = Dora(u, (norms * rng.uniform(0.8, 1.2, shape[0])).astype(np.float32))
        updates[f"{component}.{name}"] = u
    return Adapter(updates, Meta(format="native", namespace="diffusers"))


def merged(kind: str, adapter: Adapter, build: Callable[[], Any]) -> Any:
    """The model with our own folding of the adapter."""
    model = build()
    state = model.state_dict()
    for name, u in adapter.items():
        key = name.partition(".")[2]
        state[key] = torch.from_numpy(np.array(u.apply(state[key].numpy())))
    model.load_state_dict(state)
    return model


BUILD = {"sd15": sd15, "sdxl": sdxl, "flux": flux}


@pytest.mark.parametrize("to", ["diffusers", "kohya", "lycoris"])
@pytest.mark.parametrize("kind", ["sd15", "sdxl", "flux"])
def test_a_pipeline_applies_what_we_write(kind: str, to: str, tmp_path: Path) -> None:
    component = "transformer" if kind == "flux" else "unet"
    adapter = adapter_for(BUILD[kind](), component, convs=kind != "flux")
    if kind == "flux" and to != "diffusers":
        adapter = double_blocks(adapter)
    options: dict[str, Any] = {}
    if to in ("kohya", "lycoris") and kind != "flux":
        # diffusers loses alphas that differ between the attention modules of a UNet: its pattern keys match nothing
        options = {"bake": True, "unet": "authors" if kind == "sdxl" else "diffusers"}
    path = lt.save(adapter, tmp_path / "lora.safetensors", format=to, **options)
    pipe = pipeline(kind)
    pipe.load_lora_weights(path)
    got, wanted = run(kind, model_of(pipe)), run(kind, merged(kind, adapter, BUILD[kind]))
    plain = run(kind, BUILD[kind]())
    assert (wanted - plain).abs().max() > 1e-2  # the update does something
    # fp32 on both sides, a few dozen layers deep
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def double_blocks(adapter: Adapter) -> Adapter:
    """diffusers' reader of kohya's Flux files knows the single blocks at their true width only (see below)."""
    return replace(
        adapter, updates={n: u for n, u in adapter.items() if n.startswith("transformer.transformer_blocks.")}
    )


@pytest.mark.parametrize("kind", ["sd15", "flux"])
def test_magnitudes_reach_diffusers(kind: str, tmp_path: Path) -> None:
    component = "transformer" if kind == "flux" else "unet"
    adapter = adapter_for(BUILD[kind](), component, convs=False, dora=True)
    path = lt.save(adapter, tmp_path / "lora.safetensors", format="diffusers")
    pipe = pipeline(kind)
    pipe.load_lora_weights(path)
    got, wanted = run(kind, model_of(pipe)), run(kind, merged(kind, adapter, BUILD[kind]))
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "flux"])
@pytest.mark.parametrize("bake", [False, True])
def test_what_diffusers_saves_is_read(kind: str, bake: bool, tmp_path: Path) -> None:
    component = "transformer" if kind == "flux" else "unet"
    adapter = adapter_for(BUILD[kind](), component, convs=False)
    pipe = pipeline(kind)
    pipe.load_lora_weights(lt.save(adapter, tmp_path / "ours.safetensors", format="diffusers", bake=bake))
    from peft import get_peft_model_state_dict

    (name,) = model_of(pipe).peft_config
    state = get_peft_model_state_dict(model_of(pipe), adapter_name=name)
    config = model_of(pipe).peft_config[name].to_dict()
    type(pipe).save_lora_weights(
        tmp_path, **{f"{component}_lora_layers": state, f"{component}_lora_adapter_metadata": config}
    )
    again = lt.load(tmp_path / "pytorch_lora_weights.safetensors")
    assert set(again) == set(adapter)
    for name, u in adapter.items():
        # baking rounds once
        assert np.allclose(again[name].dense(), u.dense(), rtol=1e-6, atol=1e-6 * np.abs(u.dense()).max())


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "flux"])
def test_names_and_fused_projections_come_back(kind: str) -> None:
    component = "transformer" if kind == "flux" else "unet"
    adapter = adapter_for(BUILD[kind](), component, convs=kind != "flux")
    there = ready(adapter, "authors", format="comfy")
    assert all(name.startswith("diffusion_model.") for name in there)
    back = ready(there, "diffusers", format="diffusers")
    assert set(back) == set(adapter)
    for name, u in adapter.items():
        assert np.allclose(back[name].dense(), u.dense(), rtol=1e-6, atol=1e-7)
        assert back[name].rank == u.rank  # what was joined block by block comes apart at the old ranks


def test_single_blocks_of_flux_at_their_true_width() -> None:
    """diffusers' own converter splits our fused linear1 into the parts we joined."""
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers as convert

    rng = np.random.default_rng(2)
    sizes = {"attn.to_q": 3072, "attn.to_k": 3072, "attn.to_v": 3072, "proj_mlp": 12288}
    updates = {
        f"transformer.single_transformer_blocks.0.{part}.weight": LowRank(
            rng.standard_normal((rows, 2)).astype(np.float32), rng.standard_normal((2, 3072)).astype(np.float32), 0.5
        )
        for part, rows in sizes.items()
    }
    bundle = FORMATS["kohya"].encode(Adapter(updates, Meta(namespace="diffusers")))
    assert {key.partition(".")[0] for key in bundle.tensors} == {"lora_unet_single_blocks_0_linear1"}
    theirs = convert({key: torch.from_numpy(np.array(to_numpy(t))) for key, t in bundle.tensors.items()})
    for name, u in updates.items():
        module = name.removesuffix(".weight")
        b, a = theirs[f"{module}.lora_B.weight"].numpy(), theirs[f"{module}.lora_A.weight"].numpy()
        assert np.allclose(b @ a, u.dense(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dialect", ["xlabs"])
def test_xlabs_files_mean_what_diffusers_says(dialect: str) -> None:
    """diffusers' own converter of XLabs files and our reader agree on every projection of a double block."""
    from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers as convert

    rng = np.random.default_rng(3)
    state = {}
    for part, rows in (("qkv", 96), ("proj", 32)):
        for stream in (1, 2):
            stem = f"double_blocks.1.processor.{part}_lora{stream}"
            state[f"{stem}.down.weight"] = rng.standard_normal((2, 32)).astype(np.float32)
            state[f"{stem}.up.weight"] = rng.standard_normal((rows, 2)).astype(np.float32)
    adapter = ready(FORMATS[dialect].decode(from_memory(state)), "diffusers", format="diffusers")
    theirs = convert({key: torch.from_numpy(value.copy()) for key, value in state.items()})
    assert {name.removesuffix(".weight") for name in adapter} == {k.rpartition(".lora_")[0] for k in theirs}
    for name, u in adapter.items():
        module = name.removesuffix(".weight")
        product = theirs[f"{module}.lora_B.weight"] @ theirs[f"{module}.lora_A.weight"]
        assert np.allclose(product.numpy(), u.dense(), rtol=1e-5, atol=1e-5)
