"""Ranks that a server reserves memory for."""

from __future__ import annotations

from collections.abc import Mapping

LEGAL_RANKS: Mapping[str, tuple[int, ...]] = {"vllm": (1, 8, 16, 32, 64, 128, 256, 320, 512)}
"""vLLM: the legal values of ``max_lora_rank``."""
