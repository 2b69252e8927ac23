"""mlx-lm."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from loratools.consumers.base import CONSUMERS, FAILS, Evidence, Profile, Recipe, Rule, found
from loratools.consumers.health import HEALTH
from loratools.consumers.placement import drift, stored
from loratools.consumers.subject import Subject

SOURCE = "mlx-lm 0.32.2: mlx_lm/tuner/utils.py (run)"
FILE = "adapters.safetensors"
LEAVES = ("lora_a", "lora_b", "m")
_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(.+)$")


def _parameters(subject: Subject) -> Mapping[str, Any]:
    said = subject.config.get("lora_parameters")
    return said if isinstance(said, Mapping) else {}


def _no_config(subject: Subject) -> Evidence | None:
    if not subject.config:
        return Evidence("no adapter_config.json beside the tensors")
    lacking = [f for f in ("num_layers", "lora_parameters") if f not in subject.config]
    return found(
        lacking + [f"lora_parameters.{f}" for f in ("rank", "scale", "dropout") if f not in _parameters(subject)]
    )


def _file_name(subject: Subject) -> Evidence | None:
    path = subject.bundle.path
    return None if path is None or path.name == FILE else Evidence(path.name)


def _leaves(subject: Subject) -> Evidence | None:
    return found([key for key in subject.tensors if key.rpartition(".")[2] not in LEAVES])


def _ranks(subject: Subject) -> Evidence | None:
    said = _parameters(subject).get("rank")
    wrong = [f"{path} has rank {u.rank}, config {said}" for path, u in subject.factors.items() if u.rank != said]
    return found(wrong, len(subject.factors)) if said is not None else None


def _magnitudes(subject: Subject) -> Evidence | None:
    keys = [key for key in subject.tensors if key.endswith(".m")]
    return found(keys) if keys and subject.config.get("fine_tune_type", "lora") != "dora" else None


def _unmade(subject: Subject) -> Evidence | None:
    """Modules for which the config makes no adapter: outside the last num_layers blocks, or not among the keys."""
    count, total = subject.config.get("num_layers"), _layers(subject)
    keys = _parameters(subject).get("keys")
    wrong = []
    for path in subject.factors:
        block = _BLOCK.search(path)
        inside = block is not None and _reached(int(block[1]), count, total)
        named = keys is None or (block is not None and block[2] in keys)
        absolute = keys is not None and path in keys
        if not (absolute or (inside and named)):
            wrong.append(path)
    return found(wrong, len(subject.factors))


def _reached(block: int, count: object, total: int | None) -> bool:
    if not isinstance(count, int) or count <= 0 or total is None:
        return True
    return block >= total - count


def _layers(subject: Subject) -> int | None:
    config = {} if subject.base is None else subject.base.config
    said = config.get("text_config", config).get("num_hidden_layers")
    return said if isinstance(said, int) else None


RULES = (
    Rule("config", FAILS, _no_config, "mlx-lm reads num_layers and lora_parameters from adapter_config.json", SOURCE),
    Rule("file-name", FAILS, _file_name, f"mlx-lm opens {FILE} of the directory", SOURCE),
    Rule("unknown-tensors", FAILS, _leaves, "a tensor that is no adapter parameter of the model is an error", SOURCE),
    Rule(
        "rank-mismatch", FAILS, _ranks, "every adapter is made at the rank of the config, and shapes must agree", SOURCE
    ),
    Rule("magnitudes", FAILS, _magnitudes, "magnitudes need fine_tune_type dora", SOURCE),
    Rule("not-made", FAILS, _unmade, "tensors of modules outside num_layers and keys are an error", SOURCE),
)

CONSUMERS.add("mlx")(
    Profile(
        name="mlx",
        title="mlx-lm",
        version="0.32.2",
        source=SOURCE,
        ran=True,
        reads=("mlx",),
        rules=(*RULES, *drift(stored, none=FAILS, some=FAILS, source=SOURCE), *HEALTH),
        recipe=Recipe("mlx", kinds=("lowrank", "dora"), one_scale=True, uniform=True),
    )
)
