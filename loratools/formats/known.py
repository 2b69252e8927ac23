"""Formats that are recognised by their keys, so that a refusal can name what the file is."""

from __future__ import annotations

import re
from collections.abc import Callable

from loratools.io.bundle import Bundle

_KEYS: tuple[tuple[str, str], ...] = (
    (r"\.lora_[AB]\.weight$", "a LoRA with PEFT's factor names but no adapter_config.json"),
    (r"\.adapter\.linear_(in|out)\.weight$", "a Megatron or NeMo LoRA"),
    (r"\.ia3_l$|_lora_[ab]$|\.multi_lora", "a set of scaling vectors (IA3)"),
    (r"\.lora_E$", "AdaLoRA's singular values without a PEFT config"),
    (r"\.___\.layer\.", "an HCP-Diffusion LoRA"),
)


def recognise(bundle: Bundle) -> str | None:
    """Return what the file looks like, in words, or None. Order matters: narrow patterns come first."""
    for looks, name in (*_SHAPES, *((_has(pattern), name) for pattern, name in _KEYS)):
        if looks(bundle):
            return name
    return None


def _has(pattern: str) -> Callable[[Bundle], bool]:
    search = re.compile(pattern).search
    return lambda bundle: any(search(key) for key in bundle.tensors)


def _only_scalars(bundle: Bundle) -> bool:
    leaves = bundle.tensors.values()
    return bool(bundle.tensors) and all(leaf.shape in ((), (1,)) for leaf in leaves)


_SHAPES: tuple[tuple[Callable[[Bundle], bool], str], ...] = (
    (_only_scalars, "a file of scalars without any LoRA matrix (the weights were not saved)"),
)
