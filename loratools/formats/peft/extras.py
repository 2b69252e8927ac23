"""What else a LORA file may hold: biases, saved modules, resized embeddings; and how the config explains them."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from loratools.errors import FormatError
from loratools.formats.peft.config import listed

_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
_EMBEDDINGS = (
    "embed_tokens", "lm_head", "wte", "wpe", "word_embeddings", "embed_in", "embed_out", "shared", "tok_embeddings",
    "output", "embeddings",
)  # fmt: skip


def explained(name: str, key: str, config: Mapping[str, Any], adapted: Container[str] = ()) -> bool:
    """True if the config, or PEFT's habit for embeddings and heads, says why the parameter is in the file.

    ``adapted`` are the paths of the modules with factors.
    """
    return _is_bias(name, key, config, adapted) or _is_saved(name, config) or _is_embedding(name)


def _is_bias(name: str, key: str, config: Mapping[str, Any], adapted: Container[str]) -> bool:
    bias = config.get("bias", "none")
    own = isinstance(bias, str) and bias.endswith("_only")  # lora_only, vera_only, ...: of the adapted modules
    if bias not in ("none", "all") and not own:
        expected = "none, all or lora_only"
        raise FormatError("adapter_config.json: bias has an unknown value", expected=expected, got=bias)
    if not name.endswith(".bias"):
        return False
    return bool(bias == "all" or (own and (".base_layer." in key or name[: -len(".bias")] in adapted)))


def _is_saved(name: str, config: Mapping[str, Any]) -> bool:
    heads = _HEADS.get(str(config.get("task_type")), ())
    return any(f".{module}." in f".{name}" for module in (*listed(config, "modules_to_save"), *heads))


def _is_embedding(name: str) -> bool:
    """PEFT saves resized input and output embeddings whole, without a word in the config."""
    module, _, leaf = name.rpartition(".")
    return leaf in ("weight", "bias") and module.rpartition(".")[2] in _EMBEDDINGS
