"""Text Generation Inference and LoRAX."""

from __future__ import annotations

from loratools.consumers import peft_reader as reads
from loratools.consumers.base import (
    CONSUMERS,
    DORA,
    FAILS,
    IDLE,
    MERGE,
    PARTLY,
    RECOVER,
    STRENGTH,
    Profile,
    Recipe,
    Rule,
)
from loratools.consumers.health import HEALTH
from loratools.consumers.placement import both_trees, drift

SOURCE = "TGI, server/text_generation_server/adapters/lora.py"
MODULES = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "qkv_proj",
    "gate_up_proj",
    "c_fc",
    "c_proj",
    "lm_head",
)


def _takes(name: str, shape: tuple[int, ...]) -> bool:
    return name.removesuffix(".weight").rpartition(".")[2] in MODULES


RULES = (
    Rule("pickle", FAILS, reads.pickled, "only *.safetensors is looked for", SOURCE),
    Rule("type", FAILS, reads.not_lora, "the config is read as a LoraConfig", SOURCE, MERGE),
    Rule("not-linear", FAILS, reads.not_linear, "only linear layers and embeddings can be adapted", SOURCE, MERGE),
    Rule("not-multiplying", FAILS, reads.not_multiplying, "lora_A and lora_B must share their rank", SOURCE, MERGE),
    Rule(
        "mixed-ranks",
        FAILS,
        reads.mixed_ranks_of_a_type,
        "the factors of one module type are stacked over the layers",
        SOURCE,
    ),
    Rule("no-prefix", IDLE, reads.unprefixed, "exactly base_model.model.<path>.lora_A.weight is looked up", SOURCE),
    Rule(
        "adapter-name", IDLE, reads.adapter_name, "exactly base_model.model.<path>.lora_A.weight is looked up", SOURCE
    ),
    Rule("modules", PARTLY, reads.last_names(MODULES), f"only these are adapted: {', '.join(MODULES)}", SOURCE, MERGE),
    Rule("gaps", PARTLY, reads.gaps, "a module type that one layer lacks is dropped in all layers", SOURCE, MERGE),
    Rule("dora", PARTLY, reads.dora, "magnitudes are not looked up", SOURCE, DORA),
    Rule("modules-to-save", PARTLY, reads.saved_modules, "only LoRA factors are looked up", SOURCE),
    Rule("bias", PARTLY, reads.bias_tensors, "only LoRA factors are looked up", SOURCE),
    Rule("trainable-tokens", PARTLY, reads.tokens, "only LoRA factors are looked up", SOURCE),
    Rule(
        "unknown-keys",
        PARTLY,
        reads.strange_leaves("lora_A.weight", "lora_B.weight"),
        "only LoRA factors are looked up",
        SOURCE,
        MERGE,
    ),
    Rule(
        "patterns",
        STRENGTH,
        reads.misread(reads.alpha_over_r_or_root),
        "one scale, lora_alpha and r of the config, serves all modules",
        SOURCE,
    ),
    Rule(
        "altered-base",
        STRENGTH,
        reads.altered,
        "the factors are relative to a base that TGI does not alter",
        SOURCE,
        RECOVER,
    ),
)

CONSUMERS.add("tgi")(
    Profile(
        name="tgi",
        title="Text Generation Inference, LoRAX",
        version="TGI 3 (files of 2025)",
        source=SOURCE,
        ran=False,
        reads=("peft",),
        rules=(*RULES, *drift(both_trees, source=SOURCE), *HEALTH),
        recipe=Recipe("peft", one_scale=True, uniform=True, takes=_takes),
    )
)
