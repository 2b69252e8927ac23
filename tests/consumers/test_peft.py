"""PEFT, run: the verdict equals what it does, and after --fix it gives the reference output."""

from __future__ import annotations

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

torch = pytest.importorskip("torch")

CLOSE = 1e-4  # fp32 logits of two layers; folding a scale rounds each entry of lora_B once
Change = Callable[[dict[str, Any]], dict[str, Any]]


def renamed(old: str, new: str) -> Change:
    return lambda tensors: {key.replace(old, new): t for key, t in tensors.items()}


def said(**fields: Any) -> Change:
    return lambda config: {**config, **fields}


def unsaid(*fields: str) -> Change:
    return lambda config: {key: value for key, value in config.items() if key not in fields}


def without(part: str, side: str) -> Change:
    return lambda tensors: {k: t for k, t in tensors.items() if not (part in k and side in k)}


def same(x: dict[str, Any]) -> dict[str, Any]:
    return x


def narrowed(tensors: dict[str, Any]) -> dict[str, Any]:
    return {k: (t[:, :16] if "q_proj.lora_A" in k else t) for k, t in tensors.items()}


def elsewhere(tensors: dict[str, Any]) -> dict[str, Any]:
    return tensors | {k.replace("layers.1", "layers.7"): t.clone() for k, t in tensors.items() if "layers.1" in k}


# name: (make's options, change of tensors, change of config, the rule that must speak, its effect, what fix does: mends
# it, refuses (False), or writes a file in which the finding remains (None))
FAULTS: dict[str, tuple[dict[str, Any], Change, Change, str | None, str | None, bool | None]] = {
    "plain": ({}, same, same, None, None, True),
    "rslora": ({"use_rslora": True}, same, same, None, None, True),
    "dora": ({"use_dora": True}, same, same, None, None, True),
    "patterns": ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 16}}, same, same, None, None, True),
    "adapter name": ({}, renamed(".weight", ".default.weight"), same, None, None, True),
    "biases": ({"bias": "all"}, same, same, None, None, True),
    "saved": ({"modules_to_save": ["lm_head"]}, same, same, None, None, True),
    "drift": ({}, renamed("model.layers", "model.language_model.layers"), same, "prefix-drift", IDLE, True),
    "no prefix": ({}, renamed("base_model.model.", ""), same, "no-prefix", IDLE, True),
    "config rank": ({}, same, said(r=8), "rank-mismatch", FAILS, True),
    "rank unsaid": ({}, same, unsaid("r"), "rank-mismatch", FAILS, True),
    "no type": ({}, same, unsaid("peft_type"), "type", FAILS, True),
    "odd type": ({}, same, said(peft_type="FOO"), "type", FAILS, False),
    "untargeted": ({}, same, said(target_modules=["q_proj"]), "not-targeted", PARTLY, True),
    "target unsaid": ({}, same, unsaid("target_modules"), "not-targeted", PARTLY, True),
    "half a pair": ({}, without("down_proj", "lora_B"), same, "half-pairs", PARTLY, False),
    "saved missing": ({}, same, said(modules_to_save=["lm_head"]), "saved-missing", FAILS, True),
    "dora off": ({"use_dora": True}, same, said(use_dora=False), "dora-off", PARTLY, True),
    "shape": ({}, narrowed, same, "wrong-base", FAILS, None),
    "more layers": ({}, elsewhere, same, "missing-modules", PARTLY, False),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_the_verdict_is_what_peft_does_and_fix_mends_it(name: str, llama: Any, plant: Any, tmp_path: Path) -> None:
    options, tensors, config, rule, effect, mends = FAULTS[name]
    folder = tmp_path / "adapter"
    reference = llama.adapter(folder, **options)
    plant(folder, tensors, config)
    base = Base.open(llama.base)
    bad = [f for f in judged(read(folder, base=base), "peft") if f.level == "error"]
    assert rule is None or f"peft/{rule}" in [f.id for f in bad]
    assert {f.effect for f in bad} <= {effect}
    assert_behaves(llama, folder, reference, effect, extra=name == "more layers")
    out = tmp_path / "fixed"
    if mends is False:
        with pytest.raises(LoratoolsError):
            fix(read(folder, base=base), "peft", out)
        assert not out.exists()
        return
    fix(read(folder, base=base), "peft", out)
    assert check(out, "peft", base=base).checks[0]["ok"] == bool(mends)
    if mends:
        assert torch.allclose(llama.loaded(out), reference, atol=CLOSE)


def assert_behaves(llama: Any, folder: Path, reference: Any, effect: str | None, *, extra: bool) -> None:
    """Run PEFT: an error, no effect, less than the effect, or all of it."""
    if effect == FAILS:
        with pytest.raises((RuntimeError, KeyError, ValueError)):
            llama.loaded(folder)
        return
    got = llama.loaded(folder)
    if effect == IDLE:
        assert torch.equal(got, llama.untouched)
    elif effect == PARTLY and not extra:  # what lies outside the model cannot be seen in its output
        assert not torch.allclose(got, reference, atol=100 * CLOSE)
    else:
        assert torch.allclose(got, reference, atol=CLOSE)


def test_alpha_unsaid_is_a_warning_and_cannot_be_mended(llama: Any, plant: Any, tmp_path: Path) -> None:
    llama.adapter(tmp_path / "a")
    plant(tmp_path / "a", config=unsaid("lora_alpha"))
    found = judged(read(tmp_path / "a"), "peft")
    assert "peft/alpha-unsaid" in [f.id for f in found if f.level == "warning"]
    with pytest.raises(LoratoolsError, match="lora_alpha"):
        fix(read(tmp_path / "a"), "peft", tmp_path / "b")


def test_nonfinite_and_untrained_are_told(llama: Any, plant: Any, tmp_path: Path) -> None:
    llama.adapter(tmp_path / "a")
    plant(tmp_path / "a", lambda tensors: {k: t * float("nan") for k, t in tensors.items()})
    assert "peft/nonfinite" in [f.id for f in judged(read(tmp_path / "a"), "peft")]
    assert not torch.isfinite(llama.loaded(tmp_path / "a")).any()
    plant(tmp_path / "a", lambda tensors: {k: torch.zeros_like(t) for k, t in tensors.items()})
    assert "peft/untrained" in [f.id for f in judged(read(tmp_path / "a"), "peft")]
    assert torch.equal(llama.loaded(tmp_path / "a"), llama.untouched)


@pytest.mark.parametrize("tree", ["new", "old", "text"])
def test_renamed_vision_language_trees(tree: str, tmp_path: Path, plant: Any) -> None:
    """Old checkpoints load into the new tree; PEFT follows old and new names, not those of the text model."""
    import peft
    import transformers

    text = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=28, patch_size=14
    )
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=60)
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "base")
    ids = torch.arange(1, 7)[None]
    untouched = model(input_ids=ids).logits.detach()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    adapted.save_pretrained(tmp_path / "a")
    reference = adapted(input_ids=ids).logits.detach()
    new = "base_model.model.model.language_model."
    plant(
        tmp_path / "a",
        renamed(
            new, {"new": new, "old": "base_model.model.language_model.model.", "text": "base_model.model.model."}[tree]
        ),
        said(target_modules=["q_proj"]),
    )

    def run(folder: Path) -> Any:
        base = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "base").eval()
        return peft.PeftModel.from_pretrained(base, folder).eval()(input_ids=ids).logits.detach()

    base = Base.open(tmp_path / "base")
    bad = {f.id for f in judged(read(tmp_path / "a", base=base), "peft") if f.level == "error"}
    assert bad == ({"peft/prefix-drift"} if tree == "text" else set())
    assert torch.allclose(run(tmp_path / "a"), untouched if tree == "text" else reference, atol=CLOSE)
    fix(read(tmp_path / "a", base=base), "peft", tmp_path / "b")
    assert torch.allclose(run(tmp_path / "b"), reference, atol=CLOSE)
