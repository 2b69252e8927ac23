"""``lora_adapter_metadata``: the ``LoraConfig`` fields of a diffusers file, under the name of each component."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from loratools.core.adapter import Adapter
from loratools.errors import FormatError
from loratools.formats.pairs import alpha_number
from loratools.formats.peft.config import settings
from loratools.formats.peft.patterns import key_for
from loratools.kinds.dora import Dora

KEY = "lora_adapter_metadata"
Forms = Mapping[str, tuple[int, float]]  # <component>.<path> -> (rank, scale)


def scales(text: str | None, ranks: Mapping[str, int]) -> dict[str, float]:
    """Return <component>.<path> -> scale as the metadata say, 1 for components that they do not name."""
    configs = {} if text is None else _configs(text)
    done: dict[str, float] = {}
    for component in dict.fromkeys(name.partition(".")[0] for name in ranks):
        paths = {name: name.partition(".")[2] for name in ranks if name.startswith(f"{component}.")}
        config = configs.get(component) or configs.get("")
        if config is None:
            done |= dict.fromkeys(paths, 1.0)
            continue
        said = settings(config)
        alpha_of = said.alpha_of()
        done |= {name: said.scale(alpha_of(path), ranks[name]) for name, path in paths.items()}
    return done


def _configs(text: str) -> dict[str, dict[str, Any]]:
    """Return component -> config; "" holds the fields without a component (a bare model's file)."""
    try:
        said = json.loads(text)
    except json.JSONDecodeError as error:
        raise FormatError(f"the metadata {KEY} are not JSON", got=str(error)) from None
    if not isinstance(said, dict):
        raise FormatError(f"the metadata {KEY} hold no object", got=type(said).__name__)
    configs: dict[str, dict[str, Any]] = {}
    for key, value in said.items():
        component, _, field = key.rpartition(".")
        configs.setdefault(component, {})[field] = value
    return configs


def written(metadata: dict[str, str], adapter: Adapter, forms: Forms) -> dict[str, str]:
    """Return the metadata with configs that say every rank and scale: the source's own where they still hold.

    No config is written where the source had none and every scale is still 1.
    """
    ranks = {name: rank for name, (rank, _) in forms.items()}
    own = adapter.meta.source == "diffusers"
    if (
        own
        and scales(metadata.get(KEY), ranks) == {name: scale for name, (_, scale) in forms.items()}
        and _fits(metadata, ranks)
    ):
        return metadata
    table: dict[str, Any] = {}
    for component in dict.fromkeys(name.partition(".")[0] for name in forms):
        some = {name.partition(".")[2]: form for name, form in forms.items() if name.startswith(f"{component}.")}
        coats = any(isinstance(u, Dora) for name, u in adapter.items() if name.startswith(f"{component}."))
        biased = any(name.startswith(f"{component}.") and name.endswith(".bias") for name in adapter)
        table |= {f"{component}.{field}": value for field, value in _config(some, coats, biased).items()}
    return {**metadata, KEY: json.dumps(table, indent=2, sort_keys=True)}


def _fits(metadata: Mapping[str, str], ranks: Mapping[str, int]) -> bool:
    """True if the configs, if any, name the ranks of the tensors."""
    configs = _configs(metadata[KEY]) if KEY in metadata else {}
    for name, rank in ranks.items():
        component, _, path = name.partition(".")
        config = configs.get(component) or configs.get("")
        if config is not None and settings(config).rank_of()(path) != rank:
            return False
    return True


def _config(forms: Forms, use_dora: bool, lora_bias: bool) -> dict[str, Any]:
    ranks = {path: rank for path, (rank, _) in forms.items()}
    alphas = {path: alpha_number(rank, scale) for path, (rank, scale) in forms.items()}
    r = max(ranks.values())
    alpha = next(alphas[path] for path, rank in ranks.items() if rank == r)
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {key_for(path, ranks): rank for path, rank in ranks.items() if rank != r},
        "alpha_pattern": {key_for(path, ranks): a for path, a in alphas.items() if a != alpha},
        "target_modules": sorted(forms),
        "use_dora": use_dora,
        "lora_bias": lora_bias,
        "use_rslora": False,
    }
