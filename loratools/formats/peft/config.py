"""``adapter_config.json``: the settings that change what the tensors mean, checked one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from loratools.errors import FormatError, MissingScaleError
from loratools.formats.peft.patterns import resolver

MAX_RANK = 1 << 20
ALTERED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Settings:
    """What a LoRA config says about ranks and scales. ``alpha`` and ``rank`` are resolved per module path."""

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    fan_in_fan_out: bool

    def scale(self, alpha: float, rank: int) -> float:
        """Return alpha / r, or alpha / sqrt(r) under rsLoRA (arXiv:2312.03732)."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def rank_of(self) -> Callable[[str], float]:
        """Return the function module path -> configured rank."""
        return self._rank_of

    def alpha_of(self) -> Callable[[str], float]:
        """Return the function module path -> configured alpha."""
        return self._alpha_of

    @cached_property
    def _rank_of(self) -> Callable[[str], float]:
        return resolver(self.rank_pattern, self.r, "rank_pattern")

    @cached_property
    def _alpha_of(self) -> Callable[[str], float]:
        return resolver(self.alpha_pattern, self.lora_alpha, "alpha_pattern")


def settings(config: Mapping[str, Any]) -> Settings:
    """Check and return the settings; a field of the wrong type or range is a :class:`FormatError` naming it."""
    if "lora_alpha" not in config:
        raise MissingScaleError(
            "adapter_config.json does not say lora_alpha",
            expected="lora_alpha, a number",
            hint="add it (PEFT's own default would be 8)",
        )
    if "r" not in config:
        raise FormatError("adapter_config.json does not say r", expected="r, a positive integer")
    return Settings(
        r=_rank(config["r"], "r"),
        lora_alpha=number(config["lora_alpha"], "lora_alpha"),
        use_rslora=flag(config, "use_rslora"),
        rank_pattern={key: _rank(value, f"rank_pattern[{key!r}]") for key, value in table(config, "rank_pattern")},
        alpha_pattern={key: number(value, f"alpha_pattern[{key!r}]") for key, value in table(config, "alpha_pattern")},
        fan_in_fan_out=flag(config, "fan_in_fan_out"),
    )


def altered_base(config: Mapping[str, Any]) -> str | None:
    """Return the initialisation that changed the base at load time (the file is relative to that base), or None."""
    init = config.get("init_lora_weights")
    if isinstance(init, str) and any(init.lower().startswith(name) for name in ALTERED_BASE):
        return init
    said = config.get("loratools_altered_base")
    return "kasa" if config.get("kasa_config") else said if isinstance(said, str) else None


def altered_words(config: Mapping[str, Any]) -> str | None:
    """Return what :func:`altered_base` found, in the words of the config."""
    init = altered_base(config)
    if init is None:
        return None
    return "KaSA (kasa_config)" if init.lower() == "kasa" else f"init_lora_weights={init!r}"


def base_name(config: Mapping[str, Any]) -> str | None:
    """Return what the config calls its base; None where it does not, or not by a string."""
    said = config.get("base_model_name_or_path")
    return said if isinstance(said, str) else None


def listed(config: Mapping[str, Any], field: str) -> tuple[str, ...]:
    """Return a list-of-names field (null and a single string are allowed)."""
    value = config.get(field) or ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
        raise FormatError(f"adapter_config.json: {field} is not a list of names", got=repr(value)[:80])
    return tuple(value)


def _rank(value: Any, field: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
        raise FormatError(
            f"adapter_config.json: {field} is no rank",
            expected=f"an integer from 1 to {MAX_RANK}",
            got=repr(value)[:80],
        )
    return value


def number(value: Any, field: str) -> float:
    """Return a finite number; anything else is a :class:`FormatError` naming the field."""
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
    except OverflowError:  # an integer beyond every float
        number = math.inf
    if not math.isfinite(number):
        raise FormatError(
            f"adapter_config.json: {field} is no number", expected="a finite number", got=repr(value)[:80]
        )
    return number


def flag(config: Mapping[str, Any], field: str) -> bool:
    """Return a field that is true or false; null and absent are false."""
    value = config.get(field)
    if value is not None and not isinstance(value, bool):
        raise FormatError(f"adapter_config.json: {field} is neither true nor false", got=repr(value)[:80])
    return bool(value)


def table(config: Mapping[str, Any], field: str) -> list[tuple[str, Any]]:
    """Return the items of a field that is a table; null and absent are empty."""
    value = config.get(field) or {}
    if not isinstance(value, Mapping):
        raise FormatError(
            f"adapter_config.json: {field} is not a table", expected="{pattern: value}", got=repr(value)[:80]
        )
    return list(value.items())
