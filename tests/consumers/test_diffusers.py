"""diffusers, run on a tiny UNet: the verdict is what load_lora_weights does, and --fix gives the right output."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loratools.consumers.base import FAILS, IDLE, PARTLY
from loratools.consumers.subject import read
from loratools.errors import LoratoolsError
from loratools.io.base import Base
from loratools.ops.check import check, judged
from loratools.ops.fix import fix

torch = pytest.importorskip("torch", reason="torch is not installed")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

CLOSE = 1e-4  # fp32 output of a small UNet; folding a scale rounds each entry once
Pairs = dict[str, tuple[Any, Any]]


class Unet:
    """A tiny UNet, its checkpoint, and random factors for four of its modules."""

    def __init__(self, folder: Path) -> None:
        model = self.fresh()
        model.save_pretrained(folder / "unet")
        self.base = folder / "unet"
        self.modules = dict(model.named_modules())
        self.names = [n for n in self.modules if n.endswith((".to_q", ".to_v"))][:4]
        generator = torch.Generator().manual_seed(1)
        self.noise = torch.randn(1, 4, 8, 8, generator=generator)
        self.text = torch.randn(1, 3, 32, generator=generator)
        self.untouched = self.output(model)

    @staticmethod
    def fresh() -> Any:
        torch.manual_seed(0)
        return diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
            attention_head_dim=8, norm_num_groups=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ).eval()  # fmt: skip

    def output(self, model: Any) -> Any:
        with torch.no_grad():
            return model(self.noise, 5, self.text).sample

    def factors(self, *ranks: int) -> Pairs:
        generator = torch.Generator().manual_seed(2)

        def random(*shape: int) -> Any:
            return torch.randn(*shape, generator=generator) * 0.2

        sizes = {n: (self.modules[n].out_features, self.modules[n].in_features) for n in self.names}
        return {n: (random(r, sizes[n][1]), random(sizes[n][0], r)) for n, r in zip(self.names, ranks, strict=True)}

    def reference(self, pairs: Pairs, scale: Callable[[int], float]) -> Any:
        model = self.fresh()
        modules = dict(model.named_modules())
        with torch.no_grad():
            for name, (a, b) in pairs.items():
                modules[name].weight += scale(a.shape[0]) * b @ a
        return self.output(model)

    def loaded(self, path: Path) -> Any:
        """Return the output with the file loaded as a Stable Diffusion pipeline loads it."""
        from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader

        model = self.fresh()
        tensors, alphas, metadata = Loader.lora_state_dict(path, return_lora_metadata=True, unet_config=model.config)
        if not all("lora" in key for key in tensors):  # as load_lora_weights says
            raise ValueError("Invalid LoRA checkpoint")
        Loader.load_lora_into_unet(tensors, network_alphas=alphas, unet=model, metadata=metadata)
        return self.output(model)


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Unet:
    return Unet(tmp_path_factory.mktemp("unet"))


def spelled(pairs: Pairs, head: str = "unet.") -> dict[str, Any]:
    return {f"{head}{n}.lora_{side}.weight": t for n, ab in pairs.items() for side, t in zip("AB", ab, strict=True)}


def flattened(pairs: Pairs, alpha: float | None = None, **more: Any) -> dict[str, Any]:
    done: dict[str, Any] = {}
    for name, (a, b) in pairs.items():
        stem = f"lora_unet_{name.replace('.', '_')}"
        done |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b}
        done |= {} if alpha is None else {f"{stem}.alpha": torch.tensor(alpha)}
        done |= {f"{stem}.{leaf}": t for leaf, t in more.items()}
    return done


def saying(names: list[str], **fields: Any) -> dict[str, str]:
    said = {"r": 4, "lora_alpha": 4, "target_modules": names, **fields}
    return {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in said.items()})}


def one(rank: int) -> float:
    return 1.0


def over(alpha: float) -> Callable[[int], float]:
    return lambda rank: alpha / rank


def lacking_one(pairs: Pairs) -> dict[str, Any]:
    return dict(list(spelled(pairs).items())[1:])


def elsewhere(pairs: Pairs) -> dict[str, Any]:
    return {key.replace("down_blocks.1", "down_blocks.7"): t for key, t in spelled(pairs).items()}


def loha(pairs: Pairs) -> dict[str, Any]:
    return {key.replace("lora_down.weight", "hada_w1_a"): t for key, t in flattened(pairs).items()}


UNEQUAL = (2, 4, 4, 8)
# name: (tensors of the pairs, the rule, its effect, whether fix mends it, and what differs: ranks, metadata, scale);
# None: fix writes a file in which the finding remains
FAULTS: dict[str, tuple[Any, str | None, str | None, bool | None, dict[str, Any]]] = {
    "plain": (spelled, None, None, True, {}),
    "mixed ranks": (spelled, None, None, True, {"ranks": UNEQUAL}),
    "metadata": (spelled, None, None, True, {"metadata": {"lora_alpha": 2}, "scale": over(2)}),
    "kohya": (lambda p: flattened(p, 2.0), None, None, True, {"scale": over(2)}),
    "kohya mixed": (lambda p: flattened(p, 4.0), None, None, True, {"ranks": UNEQUAL, "scale": over(4)}),
    "bare": (lambda p: spelled(p, ""), "bare-paths", IDLE, True, {}),
    "authors' head": (lambda p: spelled(p, "diffusion_model."), "unet-names", IDLE, False, {}),
    "PEFT's head": (lambda p: spelled(p, "base_model.model."), "format-ignored", IDLE, False, {}),
    "metadata ranks": (
        spelled, "metadata-ranks", FAILS, True, {"ranks": UNEQUAL, "metadata": {"lora_alpha": 4}, "scale": over(4)},
    ),
    "stray key": (lambda p: spelled(p) | {"unet.norm.weight": torch.ones(2)}, "stray-keys", FAILS, True, {}),
    "stray kohya key": (lambda p: flattened(p, 4.0) | {"extra": torch.ones(2)}, "kohya-heads", FAILS, True, {}),
    "half": (lacking_one, "half-pairs", PARTLY, False, {}),
    "renamed": (elsewhere, "prefix-drift", FAILS, None, {}),
    "LoHa": (loha, "format", FAILS, False, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_the_verdict_is_what_diffusers_does(name: str, unet: Unet, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    spell, rule, effect, mends, more = FAULTS[name]
    pairs, metadata = unet.factors(*more.get("ranks", (4, 4, 4, 4))), more.get("metadata")
    path = tmp_path / "pytorch_lora_weights.safetensors"
    tensors = {key: t.contiguous() for key, t in spell(pairs).items()}
    save_file(tensors, path, metadata=None if metadata is None else saying(unet.names, **metadata))
    reference = unet.reference(pairs, more.get("scale", one))
    base = Base.open(unet.base)
    bad = [f for f in judged(read(path, base=base), "diffusers") if f.level == "error"]
    assert rule is None or f"diffusers/{rule}" in [f.id for f in bad]
    assert {f.effect for f in bad} <= {effect}
    if effect == FAILS:
        with pytest.raises((ValueError, RuntimeError)):
            unet.loaded(path)
    else:
        wanted = unet.untouched if effect == IDLE else reference
        assert torch.allclose(unet.loaded(path), wanted, atol=CLOSE) == (effect != PARTLY)
    out = tmp_path / "fixed.safetensors"
    if mends is False:
        with pytest.raises(LoratoolsError):
            fix(read(path, base=base), "diffusers", out)
        return
    fix(read(path, base=base), "diffusers", out)
    assert check(out, "diffusers", base=base).checks[0]["ok"] == bool(mends)
    assert mends is None or torch.allclose(unet.loaded(out), reference, atol=CLOSE)


def test_magnitudes_are_dropped(unet: Unet, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    pairs = unet.factors(4, 4, 4, 4)
    path = tmp_path / "dora.safetensors"
    save_file({k: t.clone() for k, t in flattened(pairs, 4.0, dora_scale=2 * torch.ones(64, 1)).items()}, path)
    assert "diffusers/dora" in [f.id for f in judged(read(path), "diffusers")]
    assert torch.allclose(unet.loaded(path), unet.reference(pairs, one), atol=CLOSE)  # as if there were no magnitudes
    out = tmp_path / "fixed.safetensors"
    fix(read(path), "diffusers", out)  # diffusers takes PEFT's magnitudes
    assert check(out, "diffusers").checks[0]["ok"]
    assert not torch.allclose(unet.loaded(out), unet.loaded(path), atol=100 * CLOSE)
