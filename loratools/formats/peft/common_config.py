"""What the config of any type says that a LORA config says in the same words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_COMMON = (
    "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "layers_pattern", "layers_to_transform", "modules_to_save", "revision", "target_modules", "target_parameters",
    "task_type", "trainable_token_indices",
)  # fmt: skip


def is_lora(config: Mapping[str, Any]) -> bool:
    """True for a config of type LORA, or of none."""
    return str(config.get("peft_type") or "LORA").upper() == "LORA"


def common(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the config says in words that every type shares."""
    return {field: config[field] for field in _COMMON if field in config}


def as_lora(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a LORA config without rank and scale: the config itself, or what another type's has in common with it."""
    if is_lora(config):
        return dict(config)
    kept = common(config)
    if str(kept.get("bias", "none")).endswith("_only"):
        kept["bias"] = "lora_only"
    return {**kept, "peft_type": "LORA"}
