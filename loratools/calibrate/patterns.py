"""What a PEFT config must say after ranks have changed at unchanged scales."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import isclose, sqrt
from typing import Any


def say_ranks(config: Any, layers: Mapping[str, Any], name: str) -> None:
    """Let config and layers (path -> LoraLayer) say the layers' ranks, with the alphas that keep their scales.

    The commonest rank and alpha become the config's own, others go into its patterns.
    """
    ranks = {path: int(layer.r[name]) for path, layer in layers.items()}
    alphas = {path: _alpha(layer.scaling[name], ranks[path], config.use_rslora) for path, layer in layers.items()}
    for path, layer in layers.items():
        layer.lora_alpha[name] = alphas[path]
    config.r, config.lora_alpha = (Counter(found.values()).most_common(1)[0][0] for found in (ranks, alphas))
    config.rank_pattern = {_key(path): r for path, r in ranks.items() if r != config.r}
    config.alpha_pattern = {_key(path): alpha for path, alpha in alphas.items() if alpha != config.lora_alpha}


def _alpha(scale: float, rank: int, rslora: bool) -> int | float:
    alpha = scale * (sqrt(rank) if rslora else rank)
    return round(alpha) if isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def _key(path: str) -> str:
    """Return the module's name as patterns match it: without PEFT's own prefix."""
    return path.removeprefix("base_model.model.")
