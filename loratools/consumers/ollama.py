"""Ollama: GGUF adapters as llama.cpp, and PEFT directories of two architectures."""

from __future__ import annotations

from loratools.consumers import gguf_reader
from loratools.consumers import peft_reader as reads
from loratools.consumers.base import (
    CONSUMERS,
    DORA,
    FAILS,
    FIX_BASE,
    MERGE,
    RECOVER,
    STRENGTH,
    UNSURE,
    Evidence,
    Profile,
    Recipe,
    Rule,
)
from loratools.consumers.health import HEALTH
from loratools.consumers.subject import Subject

SOURCE = "Ollama, convert/convert.go"
MODELS = ("llama", "mistral", "gemma2")


def _model(subject: Subject) -> str | None:
    config = {} if subject.base is None else subject.base.config
    said = config.get("text_config", config).get("model_type")
    return None if said is None else str(said)


def _other_model(subject: Subject) -> Evidence | None:
    model = _model(subject)
    return None if model is None or model in MODELS else Evidence(f"the base is a {model} model")


def _unknown_model(subject: Subject) -> Evidence | None:
    return Evidence("no --base to tell the architecture") if _model(subject) is None else None


def _float_alpha(subject: Subject) -> Evidence | None:
    alpha = subject.config.get("lora_alpha")
    return Evidence(f"lora_alpha is {alpha}") if isinstance(alpha, float) else None


PEFT = tuple(
    Rule(id, effect, find, reason, SOURCE, mend, formats=("peft",))
    for id, effect, find, reason, mend in (
        (
            "architecture",
            FAILS,
            _other_model,
            "adapters are converted for Llama and Gemma 2 only; otherwise: unsupported "
            "architecture (ollama/ollama#6858, #7781)",
            FIX_BASE,
        ),
        ("architecture-unknown", UNSURE, _unknown_model, "adapters are converted for Llama and Gemma 2 only", FIX_BASE),
        ("alpha-float", FAILS, _float_alpha, "lora_alpha is read as an unsigned integer", FIX_BASE),
        ("type", FAILS, reads.not_lora, "GGUF holds LoRA only", MERGE),
        ("not-linear", FAILS, reads.not_linear, "GGUF cannot hold convolutions", MERGE),
        ("not-multiplying", FAILS, reads.not_multiplying, "lora_A and lora_B must share their rank", MERGE),
        ("dora", FAILS, reads.dora, "GGUF holds LoRA only", DORA),
        ("modules-to-save", FAILS, reads.saved_modules, "GGUF adapters hold LoRA factors only", FIX_BASE),
        ("bias", FAILS, reads.bias_tensors, "GGUF adapters hold LoRA factors only", FIX_BASE),
        (
            "strength",
            STRENGTH,
            reads.misread(reads.alpha_over_rank),
            "lora_alpha is written for the whole file; rsLoRA and the patterns are not read",
            FIX_BASE,
        ),
        (
            "altered-base",
            STRENGTH,
            reads.altered,
            "the factors are relative to a base that is not altered here",
            RECOVER,
        ),
    )
)

CONSUMERS.add("ollama")(
    Profile(
        name="ollama",
        title="Ollama",
        version="0.11 to 0.13 (files of 2025-2026)",
        source=f"{SOURCE}; {gguf_reader.LOADER}",
        ran=False,
        reads=("gguf", "peft"),
        rules=(*PEFT, *gguf_reader.RULES, *HEALTH),
        recipe=Recipe("gguf"),
    )
)
