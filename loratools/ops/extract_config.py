"""What goes with extracted factors so that PEFT finds their modules: config and layout of a fresh LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratools.core.update import Update
from loratools.formats.peft.orientation import by_model
from loratools.io.base import Base
from loratools.kinds.replace import Replace

_INPUTS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "tok_embeddings")
PREFIX = "base_model.model."


def config_and_layout(
    updates: Mapping[str, Update], base: Base, base_id: str | None, *, tied: bool = False
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the sidecar of a LoRA with these updates, and how each is stored; ranks and scales are the writer's.

    ``tied``: the update of the input embedding is the output head's as well.
    """
    modules = [name.removesuffix(".weight") for name, u in updates.items() if not isinstance(u, Replace)]
    turned = {name for name in updates if is_turned(name, base)}
    layout = {
        name: _bias_layout(name, modules) if isinstance(u, Replace) else _factor_layout(name, name in turned)
        for name, u in updates.items()
    }
    whole = [name for name, u in updates.items() if isinstance(u, Replace)]
    biases = [name for name in whole if name.endswith(".bias") and name.removesuffix(".bias") in modules]
    saved = _outermost({n.rpartition(".")[0] for n in whole if n not in biases and not _is_input(n)})
    config = {
        "base_model_name_or_path": base_id,
        "bias": "lora_only" if biases else "none",
        "fan_in_fan_out": bool(turned),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 1,
        "lora_dropout": 0.0,
        "modules_to_save": saved or None,
        "peft_type": "LORA",
        "r": 1,
        "target_modules": sorted(modules),
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
        **({"ensure_weight_tying": True} if tied else {}),
    }
    return config, {name: said for name, said in layout.items() if said}


def _outermost(modules: set[str]) -> list[str]:
    """Return the modules that lie in no other of them."""
    return sorted(m for m in modules if not any(m.startswith(f"{other}.") for other in modules))


def _is_input(name: str) -> bool:
    """True for an input embedding, which PEFT loads without being told."""
    return name.endswith(".weight") and name.removesuffix(".weight").rpartition(".")[2] in _INPUTS


def is_turned(name: str, base: Base) -> bool:
    """True for a parameter stored (in, out): GPT-2's Conv1D, known by model type and module name."""
    return by_model(name.removesuffix(".weight"), base.config.get("model_type")) == "in_out"


def _factor_layout(name: str, turned: bool) -> dict[str, Any]:
    return {"path": name.removesuffix(".weight"), "stored": "in_out" if turned else "out_in"}


def _bias_layout(name: str, modules: list[str]) -> dict[str, Any]:
    """PEFT keeps the bias of an adapted module inside its ``base_layer``."""
    path = name.removesuffix(".bias")
    return {"key": f"{PREFIX}{path}.base_layer.bias"} if name.endswith(".bias") and path in modules else {}
