"""TensorRT-LLM's loader of Hugging Face directories."""

from __future__ import annotations

from loratools.consumers import peft_reader as reads
from loratools.consumers.base import (
    CONSUMERS,
    FAILS,
    MERGE,
    NOTE,
    PARTLY,
    RECOVER,
    STRENGTH,
    Evidence,
    Profile,
    Recipe,
    Rule,
)
from loratools.consumers.health import HEALTH
from loratools.consumers.placement import both_trees, drift
from loratools.consumers.subject import Subject

SOURCE = "TensorRT-LLM, tensorrt_llm/lora_manager.py"
MODULES = (
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "gate_up_proj",
    "w1",
    "w2",
    "w3",
    "gate",
)
WHOLE = ("lm_head", "embed_tokens")


def _takes(name: str, shape: tuple[int, ...]) -> bool:
    return name.removesuffix(".weight").rpartition(".")[2] in MODULES


def _other_saved(subject: Subject) -> Evidence | None:
    seen = reads.saved_modules(subject)
    if seen is None:
        return None
    others = [key for key in seen.modules if not any(f".{name}." in f".{key}" for name in WHOLE)]
    return Evidence(f"{len(others)}: {', '.join(others[:3])}", tuple(others)) if others else None


RULES = (
    Rule(
        "fields",
        FAILS,
        reads.lacks("r", "lora_alpha", "target_modules"),
        "these fields are read unconditionally",
        SOURCE,
    ),
    Rule("type", FAILS, reads.not_lora, "only LoRA keys are understood", SOURCE, MERGE),
    Rule("not-linear", FAILS, reads.not_linear, "only linear layers and embeddings can be adapted", SOURCE, MERGE),
    Rule("not-multiplying", FAILS, reads.not_multiplying, "lora_A and lora_B must share their rank", SOURCE, MERGE),
    Rule("adapter-name", PARTLY, reads.adapter_name, "keys that the pattern does not match are skipped", SOURCE),
    Rule("modules", PARTLY, reads.last_names(MODULES), "unknown modules are skipped with a warning", SOURCE, MERGE),
    Rule("modules-to-save", PARTLY, _other_saved, "of whole modules only lm_head and embed_tokens are taken", SOURCE),
    Rule("bias", PARTLY, reads.bias_tensors, "keys that the pattern does not match are skipped", SOURCE),
    Rule(
        "patterns",
        STRENGTH,
        reads.misread(reads.alpha_over_r_or_root),
        "rank, alpha and use_rslora come from the config; the patterns are not read",
        f"{SOURCE}; NVIDIA/TensorRT-LLM#1668, #1477",
    ),
    Rule(
        "altered-base",
        STRENGTH,
        reads.altered,
        "the factors are relative to a base that is not altered here",
        SOURCE,
        RECOVER,
    ),
    Rule(
        "dora",
        NOTE,
        reads.dora,
        "the loader's pattern matches magnitudes; older versions have no DoRA",
        f"{SOURCE}; NVIDIA/TensorRT-LLM#2132",
        MERGE,
    ),
)

CONSUMERS.add("tensorrt-llm")(
    Profile(
        name="tensorrt-llm",
        title="TensorRT-LLM",
        version="0.20 to 1.0 (files of 2025)",
        source=SOURCE,
        ran=False,
        reads=("peft",),
        rules=(*RULES, *drift(both_trees, source=SOURCE), *HEALTH),
        recipe=Recipe("peft", kinds=("lowrank", "dora"), one_scale=True, uniform=True, takes=_takes),
    )
)
