"""vLLM: the strictest reader of PEFT directories."""

from __future__ import annotations

from loratools.consumers import peft_reader as reads
from loratools.consumers.base import (
    CONSUMERS,
    DORA,
    FAILS,
    MERGE,
    NOTE,
    RECOVER,
    STRENGTH,
    UNSURE,
    Evidence,
    Profile,
    Recipe,
    Rule,
)
from loratools.consumers.health import HEALTH
from loratools.consumers.placement import both_trees, drift
from loratools.consumers.ranks import LEGAL_RANKS
from loratools.consumers.subject import Subject

HELPER = "vLLM, vllm/lora/peft_helper.py"
MODEL = "vLLM, vllm/lora/lora_model.py"
RANKS = LEGAL_RANKS["vllm"]
DEFAULT_LIMIT = 16


def _server_flag(subject: Subject) -> Evidence | None:
    rank = reads.largest_rank(subject)
    fitting = next((legal for legal in RANKS if legal >= rank), None)
    if fitting is None or fitting <= DEFAULT_LIMIT or subject.limit is not None:
        return None
    return Evidence(f"rank {rank}: start the server with --max-lora-rank {fitting} (its default is {DEFAULT_LIMIT})")


def _odd_rank(subject: Subject) -> Evidence | None:
    rank = reads.largest_rank(subject)
    return (
        None
        if rank in RANKS or rank > RANKS[-1]
        else Evidence(f"rank {rank} is not one of {', '.join(map(str, RANKS))}")
    )


RULES = (
    Rule("fields", FAILS, reads.lacks("r", "lora_alpha", "target_modules"), "these fields are required", HELPER),
    Rule("type", FAILS, reads.not_lora, "vLLM serves LoRA only", MODEL, MERGE),
    Rule(
        "modules-to-save",
        FAILS,
        reads.saved_modules,
        "modules_to_save must be empty, and every tensor a LoRA factor",
        f"{HELPER}; vllm-project/vllm#9280",
    ),
    Rule("dora", FAILS, reads.dora, "vLLM does not support DoRA", HELPER, DORA),
    Rule("bias", FAILS, reads.biases, "bias tensors are unsupported LoRA weights", MODEL),
    Rule("trainable-tokens", FAILS, reads.tokens, "every tensor must be a LoRA factor", MODEL),
    Rule("adapter-name", FAILS, reads.adapter_name, "keys with an adapter name are unsupported LoRA weights", MODEL),
    Rule("unknown-keys", FAILS, reads.strange_leaves(*reads.FACTORS), "every tensor must be a LoRA factor", MODEL),
    Rule("not-linear", FAILS, reads.not_linear, "only linear layers and embeddings can be adapted", MODEL, MERGE),
    Rule("not-multiplying", FAILS, reads.not_multiplying, "lora_A and lora_B must share their rank", MODEL, MERGE),
    Rule(
        "rank-limit",
        FAILS,
        reads.above(RANKS[-1]),
        "the rank is above what the server reserves memory for",
        "vLLM, max_lora_rank; vllm-project/vllm#2847",
        "loratools squeeze {path} --rank N --uniform -o OUT   # lossy: the report tells how much",
    ),
    Rule(
        "patterns",
        STRENGTH,
        reads.misread(reads.alpha_over_r_or_root),
        "one scale, lora_alpha and r of the config, serves all modules",
        HELPER,
    ),
    Rule(
        "rslora-experts",
        STRENGTH,
        reads.experts_with_rslora,
        "rsLoRA's scale is ignored on experts",
        "vllm-project/vllm#55545",
    ),
    Rule(
        "altered-base",
        STRENGTH,
        reads.altered,
        "the factors are relative to a base that vLLM does not alter",
        HELPER,
        RECOVER,
    ),
    Rule(
        "expert-stacks",
        UNSURE,
        reads.stacked_experts,
        "nested expert stacks load on models flagged for them only, and are transposed between PEFT releases",
        "vllm-project/vllm#33259, #41384, #52194",
        MERGE,
    ),
    Rule(
        "rank-odd",
        NOTE,
        _odd_rank,
        "max_lora_rank must be one of a few numbers; a smaller rank wastes what is reserved",
        "vLLM, max_lora_rank",
    ),
    Rule(
        "server-flag",
        NOTE,
        _server_flag,
        "the server refuses ranks above its own limit",
        "vLLM, --max-lora-rank; vllm-project/vllm#2847",
        "vllm serve ... --max-lora-rank N",
    ),
)

CONSUMERS.add("vllm")(
    Profile(
        name="vllm",
        title="vLLM",
        version="0.11 to 0.12 (files of 2025-2026)",
        source=f"{HELPER}; {MODEL}",
        ran=False,
        reads=("peft",),
        rules=(*RULES, *drift(both_trees, source="vllm-project/vllm#48019"), *HEALTH),
        recipe=Recipe("peft", one_scale=True, uniform=True, ranks=RANKS),
    )
)
