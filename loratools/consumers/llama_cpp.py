"""llama.cpp: GGUF adapters; and what its converter convert_lora_to_gguf.py makes of PEFT directories."""

from __future__ import annotations

from loratools.consumers import gguf_reader
from loratools.consumers import peft_reader as reads
from loratools.consumers.base import CONSUMERS, FAILS, FIX_BASE, MERGE, STRENGTH, Evidence, Profile, Recipe, Rule, found
from loratools.consumers.health import HEALTH
from loratools.consumers.subject import Subject

SCRIPT = "llama.cpp, convert_lora_to_gguf.py"


def _norm_weights_aside(subject: Subject) -> Evidence | None:
    """Whole tensors other than norms and base layers, on which the converter stops."""
    seen = reads.saved_modules(subject)
    named = () if seen is None else seen.modules
    others = [k for k in named if "layernorm" not in k and not k.endswith(("norm.weight", ".base_layer.weight"))]
    return found(others) or (seen if seen is not None and not named else None)


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
        ("converter-dora", FAILS, reads.dora, "stops at magnitudes; GGUF cannot hold them", MERGE),
        ("converter-modules-to-save", FAILS, _norm_weights_aside, "stops at whole tensors: unexpected name", FIX_BASE),
        ("converter-bias", FAILS, reads.biases, "stops at biases: unexpected name", FIX_BASE),
        ("converter-adapter-name", FAILS, reads.adapter_name, "stops at keys with an adapter name", FIX_BASE),
        ("converter-not-linear", FAILS, reads.not_linear, "cannot hold convolutions", MERGE),
        ("converter-not-multiplying", FAILS, reads.not_multiplying, "needs factors of one rank", MERGE),
        ("converter-type", FAILS, reads.not_lora, "knows LoRA only", MERGE),
        ("converter-altered-base", STRENGTH, reads.altered, "does not know that the base was altered", MERGE),
    )
)

CONSUMERS.add("llama.cpp")(
    Profile(
        name="llama.cpp",
        title="llama.cpp",
        version="as in llama-cpp-python 0.3.36",
        source=f"{gguf_reader.LOADER}; {SCRIPT}",
        ran=False,
        reads=("gguf",),
        converts=("peft",),
        rules=(*gguf_reader.RULES, *CONVERTER, *HEALTH),
        recipe=Recipe("gguf"),
    )
)
