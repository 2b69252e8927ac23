"""SGLang."""

from __future__ import annotations

from loratools.consumers import peft_reader as reads
from loratools.consumers.base import CONSUMERS, DORA, FAILS, MERGE, NOTE, RECOVER, STRENGTH, Profile, Recipe, Rule
from loratools.consumers.health import HEALTH
from loratools.consumers.placement import both_trees, drift

CONFIG = "SGLang, python/sglang/srt/lora/lora_config.py"

RULES = (
    Rule(
        "fields",
        FAILS,
        reads.lacks("r", "lora_alpha", "target_modules"),
        "these fields are read unconditionally",
        CONFIG,
    ),
    Rule("type", FAILS, reads.not_lora, "SGLang serves LoRA only", CONFIG, MERGE),
    Rule("dora", FAILS, reads.dora, "DoRA is not served", CONFIG, DORA),
    Rule("not-linear", FAILS, reads.not_linear, "only linear layers and embeddings can be adapted", CONFIG, MERGE),
    Rule("not-multiplying", FAILS, reads.not_multiplying, "lora_A and lora_B must share their rank", CONFIG, MERGE),
    Rule(
        "rank-limit",
        FAILS,
        reads.above(),
        "the rank is above the limit that the server was started with",
        "SGLang, --max-lora-rank",
        "loratools squeeze {path} --rank N --uniform -o OUT   # lossy",
    ),
    Rule(
        "strength",
        STRENGTH,
        reads.misread(reads.alpha_over_r),
        "one scale, lora_alpha / r, serves all modules; rsLoRA and the patterns are not applied",
        f"{CONFIG}; sgl-project/sglang#40835",
    ),
    Rule(
        "altered-base",
        STRENGTH,
        reads.altered,
        "the factors are relative to a base that SGLang does not alter",
        CONFIG,
        RECOVER,
    ),
    Rule(
        "expert-stacks",
        NOTE,
        reads.stacked_experts,
        "decoded by shape since the pull request named here; not before",
        "sgl-project/sglang#25528",
        MERGE,
    ),
)

CONSUMERS.add("sglang")(
    Profile(
        name="sglang",
        title="SGLang",
        version="0.5 (files of 2025-2026)",
        source=CONFIG,
        ran=False,
        reads=("peft",),
        rules=(*RULES, *drift(both_trees, source=CONFIG), *HEALTH),
        recipe=Recipe("peft", one_scale=True, uniform=True),
    )
)
