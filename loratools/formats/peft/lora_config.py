"""The sidecar of a written LORA file: ranks and scales said so that careless readers are right as often as possible.

With every scale 1 (our default) ``r = lora_alpha = largest rank`` and both patterns list the others: a reader that
ignores patterns still applies scale 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from loratools.core.adapter import Adapter
from loratools.formats.peft.common_config import as_lora, is_lora
from loratools.formats.peft.config import altered_base, settings
from loratools.formats.peft.forms.tokens import INDICES, said_again
from loratools.formats.peft.patterns import key_for
from loratools.formats.stored import is_turned
from loratools.kinds.dense import Dense
from loratools.kinds.rebased import Rebased
from loratools.kinds.replace_rows import ReplaceRows

Told = Mapping[str, tuple[int, float]]  # path that the config's patterns see -> (rank, scale)
ALTERED = "loratools_altered_base"
_ABSORBED: Mapping[str, Any] = {"kasa_config": None, "use_bdlora": None, "use_qalora": False}


def written(adapter: Adapter, told: Told) -> dict[str, Any]:
    """Return a config for modules of the given ranks and scales, without settings that no longer mean anything."""
    source = as_lora(adapter.meta.config) if adapter.meta.source == "peft" else {}
    ranks = {path: rank for path, (rank, _) in told.items()}
    alphas = {path: _alpha(rank, scale) for path, (rank, scale) in told.items()}
    r = max(ranks.values())
    alpha = next(alphas[path] for path, rank in ranks.items() if rank == r)
    config = {
        **(source or _fresh(adapter, told)),
        "r": r,
        "lora_alpha": alpha,
        "use_rslora": False,
        "rank_pattern": {key_for(path, ranks): rank for path, rank in ranks.items() if rank != r},
        "alpha_pattern": {key_for(path, ranks): a for path, a in alphas.items() if a != alpha},
        **_rows(adapter, source),
    }
    if not is_lora(adapter.meta.config):
        matrices = [f"{path}.weight" for path in told]
        embeddings = [n for n in matrices if adapter.meta.layout.get(n, {}).get("form") == "embedding"]
        config |= {"fan_in_fan_out": any(is_turned(adapter, n) for n in matrices if n not in embeddings)}
        config |= {"lora_bias": any(isinstance(u, Dense) for u in adapter.values())}
    if adapter.meta.absorbed:
        config |= {name: idle for name, idle in _ABSORBED.items() if name in source}
        config.pop("enable_lora", None)
    if source.get("monteclora_config"):
        config["monteclora_config"] = None  # its sampler has the sizes of the old ranks, and serves training alone
    altered = altered_base(source)
    if altered:
        config["init_lora_weights"] = True  # at load PEFT would alter the base again, at the new rank
        config[ALTERED] = altered
    return config


def holds(adapter: Adapter, told: Told) -> bool:
    """True if the config that the adapter came with says these ranks and scales, and these rows of tokens."""
    source = adapter.meta.config if adapter.meta.source == "peft" else {}
    if not source or not is_lora(source) or _rows(adapter, source) not in ({}, {INDICES: source.get(INDICES)}):
        return False
    said = settings(source)
    rank_of, alpha_of = said.rank_of(), said.alpha_of()
    return all(
        rank_of(path) == rank and math.isclose(said.scale(alpha_of(path), rank), scale, rel_tol=1e-12)
        for path, (rank, scale) in told.items()
    )


def _rows(adapter: Adapter, source: Mapping[str, Any]) -> dict[str, Any]:
    """Return the setting that says which rows of embeddings are replaced, if any are."""
    inner = {n: u.update if isinstance(u, Rebased) else u for n, u in adapter.items()}
    rows = {n.removesuffix(".weight"): u.index for n, u in inner.items() if isinstance(u, ReplaceRows)}
    return {INDICES: said_again(source, rows)} if rows else {}


def _alpha(rank: int, scale: float) -> int | float:
    """Return scale * rank, as an int where it is one: some readers insist."""
    alpha = scale * rank
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def _fresh(adapter: Adapter, told: Told) -> dict[str, Any]:
    """Return a config for an adapter that did not come from PEFT; what it must name is added by its caller."""
    return {
        "base_model_name_or_path": adapter.meta.base_id,
        "bias": "none",
        "fan_in_fan_out": all(is_turned(adapter, f"{path}.weight") for path in told),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "target_modules": [],
        "target_parameters": None,
        "task_type": None,
        "use_dora": False,
    }
