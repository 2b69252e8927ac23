"""llama.cpp: GGUF adapters; and what its converter convert_lora_to_gguf.py makes of PEFT directories."""

from __future__ import annotations

from loratools.consumers import gguf_reader
from loratools.consumers import peft_reader as reads
from loratools.consumers.base import (
    CONSUMERS,
    DORA,
    FAILS,
    FIX_BASE,
    MERGE,
    PARTLY,
    RECOVER,
    STRENGTH,
    Evidence,
    Profile,
    Recipe,
    Rule,
    found,
)
from loratools.consumers.health import HEALTH
from loratools.consumers.placement import both_trees, drift
from loratools.consumers.subject import Subject

SCRIPT = "llama.cpp, convert_lora_to_gguf.py"


def _whole(subject: Subject) -> list[str]:
    """Return the keys of whole tensors that the converter does not pass over: it skips wrapped base layers."""
    return [k for k, p in subject.keys.items() if not p.leaf and ".base_layer.weight" not in k and k[-5:] != ".bias"]


def _is_norm(key: str) -> bool:
    return "_layernorm" in key or ".norm" in key


def _whole_but_norms(subject: Subject) -> Evidence | None:
    """Whole tensors other than norms, on which the converter stops."""
    return found([k for k in _whole(subject) if not _is_norm(k)])


def _norms(subject: Subject) -> Evidence | None:
    """Weights of norms, which the converter writes."""
    return found([k for k in _whole(subject) if _is_norm(k)])


CONVERTER = tuple(
    Rule(id, effect, find, f"its converter {reason}", SCRIPT, mend, formats=("peft",))
    for id, effect, find, reason, mend in (
        (
            "converter-strength",
            STRENGTH,
            reads.misread(reads.alpha_over_rank),
            "writes lora_alpha alone; rsLoRA and the patterns are not read",
            FIX_BASE,
        ),
        ("converter-dora", FAILS, reads.dora, "stops at magnitudes; GGUF cannot hold them", DORA),
        ("converter-modules-to-save", FAILS, _whole_but_norms, "stops at whole tensors: unexpected name", FIX_BASE),
        ("converter-norms", PARTLY, _norms, "writes weights of norms, which the loader ignores", FIX_BASE),
        ("converter-tokens", FAILS, reads.tokens, "stops at trained rows of tokens: unexpected name", FIX_BASE),
        ("converter-bias", FAILS, reads.bias_tensors, "stops at biases: unexpected name", FIX_BASE),
        ("converter-adapter-name", FAILS, reads.adapter_name, "stops at keys with an adapter name", FIX_BASE),
        ("converter-not-linear", FAILS, reads.not_linear, "cannot hold convolutions", MERGE),
        ("converter-not-multiplying", FAILS, reads.not_multiplying, "needs factors of one rank", MERGE),
        ("converter-type", FAILS, reads.not_lora, "knows LoRA only", MERGE),
        ("converter-altered-base", STRENGTH, reads.altered, "does not know that the base was altered", RECOVER),
    )
)

NAMES = drift(both_trees, none=FAILS, some=FAILS, source=SCRIPT, formats=("peft",))

CONSUMERS.add("llama.cpp")(
    Profile(
        name="llama.cpp",
        title="llama.cpp",
        version="as in xllamacpp 2026.10.11549, and the converter of llama-cpp-python 0.3.36",
        source=f"{gguf_reader.LOADER}; {SCRIPT}",
        ran=True,
        reads=("gguf",),
        converts=("peft",),
        rules=(*gguf_reader.RULES, *CONVERTER, *NAMES, *HEALTH),
        recipe=Recipe("gguf"),
    )
)
