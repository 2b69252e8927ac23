"""Tied weights: one stored tensor that is input embedding and output head at once, and what an update does to them."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from loratools.errors import MismatchError
from loratools.io.base import Base

_INPUTS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "shared.weight")
_HEADS = ("lm_head.weight", "embed_out.weight", "cls.predictions.decoder.weight")
_GENERATORS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM")


class Tie(NamedTuple):
    """The stored tensor and the name of the head that shares it, in the spelling of the base."""

    embedding: str
    head: str


def tie_of(base: Base) -> Tie | None:
    """Return the tie of a model, or None: its config says so, or a generator stores an embedding and no head.

    A model with another head (a classifier) has none, whatever its config inherited.
    """
    inner = base.config.get("text_config")
    said = base.config.get("tie_word_embeddings", inner.get("tie_word_embeddings") if isinstance(inner, dict) else None)
    embedding = next((name for suffix in _INPUTS for name in base if f".{name}".endswith(f".{suffix}")), None)
    head = next((name for suffix in _HEADS for name in base if f".{name}".endswith(f".{suffix}")), None)
    if embedding is None or said is False:
        return None
    architectures = base.config.get("architectures") or ()
    generator = any(str(a).endswith(_GENERATORS) for a in architectures)
    if (said and (generator or not architectures)) or (head is None and generator):
        return Tie(embedding, head or _unstored_head(embedding))
    return None


def _unstored_head(embedding: str) -> str:
    """Return the name of a head that is not stored, by the embedding's family."""
    if "embed_in" in embedding:
        return "embed_out.weight"
    return "cls.predictions.decoder.weight" if "bert" in embedding else "lm_head.weight"


def must_untie(tie: Tie, touched: Collection[str], *, together: bool, untie: bool) -> bool:
    """Return whether head and embedding go separate ways after updates of ``touched`` parameters.

    ``together``: the adapter itself means both (equal replacements, trained rows, or a config that ties its updates).
    Raises MismatchError where they would have to part and ``untie`` does not allow it.
    """
    if not {*tie} & set(touched) or together:
        return False
    if untie:
        return True
    changed, other = (tie.head, tie.embedding) if tie.head in touched else (tie.embedding, tie.head)
    raise MismatchError(
        f"the base ties {tie.head} to {tie.embedding}, and the adapter updates only one of them",
        parameter=changed,
        got=f"merging into the shared tensor would change {other} as well",
        hint="--untie stores them separately and sets tie_word_embeddings to false in config.json",
    )
