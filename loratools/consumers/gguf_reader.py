"""Predicates over GGUF adapters, for llama.cpp and what is built on it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from loratools.consumers.base import FAILS, FIX_BASE, PARTLY, Evidence, Rule, found, some
from loratools.consumers.placement import drift
from loratools.consumers.subject import Subject
from loratools.errors import LoratoolsError
from loratools.formats.trees import GGUF, to_theirs, tree_of
from loratools.io.base import Base

LOADER = "llama.cpp, src/llama-adapter.cpp"
ARCH = "general.architecture"
MAX_NAME = 63
_NORM = re.compile(r"_norm\.weight$")
_FACTOR = re.compile(r"\.lora_[ab]$")


def _types(subject: Subject) -> Evidence | None:
    wanted = {"general.type": "adapter", "adapter.type": "lora"}
    said = subject.bundle.metadata
    return found([f"{key} is {said.get(key)}" for key, value in wanted.items() if said.get(key) != value])


def _suffixes(subject: Subject) -> Evidence | None:
    return found([key for key in subject.tensors if not _FACTOR.search(key) and not _NORM.search(key)])


def _norms(subject: Subject) -> Evidence | None:
    return found([key for key in subject.tensors if _NORM.search(key)])


def _halves(subject: Subject) -> Evidence | None:
    stems = {key[:-7] for key in subject.tensors if _FACTOR.search(key)}
    return found([s for s in sorted(stems) if not {f"{s}.lora_a", f"{s}.lora_b"} <= set(subject.tensors)])


def _long_names(subject: Subject) -> Evidence | None:
    return found([key for key in subject.tensors if len(key.encode()) > MAX_NAME])


def _shapes(subject: Subject) -> Evidence | None:
    """Pairs whose inner sizes differ: a (r, in) and b (out, r); token_embd has a (vocab, r)."""
    wrong = []
    for key, a in subject.tensors.items():
        b = subject.tensors.get(f"{key[:-7]}.lora_b")
        if not key.endswith(".lora_a") or b is None or len(a.shape) < 2 or len(b.shape) < 2:
            continue
        rank = a.shape[-1] if key.startswith("token_embd.") else a.shape[-2]
        wrong += [f"{key[:-7]}: {a.shape}, {b.shape}"] if rank != b.shape[-1] else []
    return found(wrong)


def _other_arch(subject: Subject) -> Evidence | None:
    if subject.base is None or not subject.base.config:
        return None
    said = subject.bundle.metadata.get(ARCH)
    try:
        wanted = tree_of(
            GGUF, subject.base.config.get("text_config", subject.base.config)["model_type"], "llama.cpp"
        ).arch
    except (LoratoolsError, KeyError):
        return None
    return None if said == wanted else Evidence(f"{ARCH} is {said}, the base is {wanted}")


def _tied_output(subject: Subject) -> Evidence | None:
    tied = subject.base is not None and subject.base.config.get("tie_word_embeddings")
    keys = [key for key in subject.tensors if key.startswith("output.weight.")]
    return some(keys) if tied and keys else None


def _both_names(base: Base) -> Mapping[str, tuple[int, ...]]:
    """Return the base's parameters by their own names and by llama.cpp's, where its model type is known."""
    try:
        tree = tree_of(GGUF, base.config.get("text_config", base.config)["model_type"], "llama.cpp")
    except (LoratoolsError, KeyError):
        return {}
    theirs = {to_theirs(tree, name.removesuffix(".weight")): shape for name, shape in base.shapes.items()}
    return {**base.shapes, **{f"{name}.weight": shape for name, shape in theirs.items() if name is not None}}


AGAIN = "write the file again: loratools convert SOURCE --to gguf --base BASE -o OUT"
_RULES = tuple(
    Rule(id, effect, find, reason, LOADER, mend, formats=("gguf",))
    for id, effect, find, reason, mend in (
        ("types", FAILS, _types, "the loader demands general.type adapter and adapter.type lora", AGAIN),
        ("suffix", FAILS, _suffixes, "a tensor that ends in neither .lora_a nor .lora_b is an error", AGAIN),
        ("half-pairs", FAILS, _halves, "every lora_a needs its lora_b", AGAIN),
        ("shapes", FAILS, _shapes, "the inner sizes of a pair must agree", AGAIN),
        ("long-names", FAILS, _long_names, f"tensor names have at most {MAX_NAME} bytes", AGAIN),
        ("architecture", FAILS, _other_arch, "the architecture must be that of the loaded model", AGAIN),
        ("tied-output", FAILS, _tied_output, "a tied model has no output.weight, and every stem must exist", FIX_BASE),
        ("norms", PARTLY, _norms, "*_norm.weight is accepted and ignored", AGAIN),
    )
)
RULES = (*_RULES, *drift(_both_names, none=FAILS, some=FAILS, source=LOADER, formats=("gguf",)))
