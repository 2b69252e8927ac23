"""Which tensor of a tuned model is which of its base: matched and explained by headers, before any tensor is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loratools.errors import MismatchError
from loratools.io.base import Base
from loratools.linalg.namespace import is_float, raw_bytes
from loratools.ops.tied import tie_of

_EMBEDDINGS = ("wte", "wpe", "shared", "relative_attention_bias", "tok_embeddings")


@dataclass(frozen=True)
class Pairing:
    """Tuned name -> base name by what becomes of them, and what to tell.

    ``low_rank``: matrices to decompose; ``whole``: biases, norms, embeddings, new or resized tensors, kept whole where
    they changed (base name None: new or of another size).
    """

    low_rank: Mapping[str, str]
    whole: Mapping[str, str | None]
    remarks: tuple[str, ...]


def paired(base: Base, tuned: Base) -> Pairing:
    """Match two models. Names of the tuned model rule: it was saved as training saw it.

    One prefix added to or taken from all names, unique endings and known renamings are found, a head that only one
    model stores because of tied weights is explained, a resized vocabulary is told. Raises MismatchError (the first
    three and the count) for other shapes that differ, and for models with nothing in common.
    """
    found = base.resolve(tuned, optional=set(tuned))
    if not found:
        raise MismatchError("the two models share no parameter", expected=_some(list(base)), got=_some(list(tuned)))
    resized = {name for name, source in found.items() if tuned.shapes[name] != base.shapes[source]}
    _check_resized(base, tuned, found, resized)
    tied = _tied_head(tuned)
    new = [name for name in tuned if name not in found and name != tied]
    whole_modules = tuple({f"{n.rpartition('.')[0]}." for n in found if _is_bare(n, tuned)})
    low_rank = {
        n: s for n, s in found.items() if n not in resized and _is_matrix(n, tuned) and not n.startswith(whole_modules)
    }
    whole: dict[str, str | None] = {n: s for n, s in found.items() if n not in resized and n not in low_rank}
    whole |= dict.fromkeys([*resized, *new])
    return Pairing(low_rank, whole, tuple(_remarks(base, tuned, found, sorted(resized), new, tied)))


def is_embedding(name: str) -> bool:
    """True for tables that are looked up, not multiplied: told by the name of their module."""
    module = name.rpartition(".")[0].rpartition(".")[2] or name
    return "embed" in module or module in _EMBEDDINGS


def _is_matrix(name: str, model: Base) -> bool:
    shape = model.shapes[name]
    return len(shape) >= 2 and min(shape) > 1 and is_float(model.dtypes[name]) and not is_embedding(name)


def _is_bare(name: str, model: Base) -> bool:
    """True for a floating parameter that is no module's weight or bias: only its whole module can be stored."""
    module, _, leaf = name.rpartition(".")
    plain = leaf in ("weight", "bias") or len(model.shapes[name]) > 2
    return bool(module) and not plain and is_float(model.dtypes[name])


def _check_resized(base: Base, tuned: Base, found: Mapping[str, str], resized: set[str]) -> None:
    """Only the rows of embeddings and heads may differ in number: a vocabulary that was resized."""
    wrong = [n for n in found if n in resized and not _is_resize(base.shapes[found[n]], tuned.shapes[n])]
    if wrong:
        raise MismatchError(
            f"{len(wrong)} of {len(found)} parameters have another shape in the tuned model",
            file=tuned.path,
            got="; ".join(f"{n}: base {base.shapes[found[n]]}, tuned {tuned.shapes[n]}" for n in wrong[:3]),
            hint="check that BASE is the model that was tuned",
        )


def _is_resize(old: tuple[int, ...], new: tuple[int, ...]) -> bool:
    return len(old) == len(new) and len(old) in (1, 2) and old[1:] == new[1:]


def _tied_head(model: Base) -> str | None:
    """Return the stored head that is the input embedding once more, or None."""
    tie = tie_of(model)
    if tie is None or tie.head not in model or model.shapes[tie.head] != model.shapes[tie.embedding]:
        return None
    return tie.head if raw_bytes(model.leaf(tie.head)) == raw_bytes(model.leaf(tie.embedding)) else None


def _remarks(
    base: Base, tuned: Base, found: Mapping[str, str], resized: list[str], new: list[str], tied: str | None
) -> list[str]:
    renamed = [name for name, source in found.items() if name != source]
    lost = sorted(set(base) - set(found.values()))
    return [
        *([f"names differ from the base's, e.g. {renamed[0]} is {found[renamed[0]]}; the tuned model's are used"]
          if renamed else []),
        *([f"{tied} is stored twice in the tuned model (tied weights): its update is the embedding's"]
          if tied and tied not in found else []),
        *([f"resized vocabulary: {', '.join(f'{n} {base.shapes[found[n]]} -> {tuned.shapes[n]}' for n in resized[:3])}"]
          if resized else []),
        *([f"new in the tuned model: {_some(new)}"] if new else []),
        *([f"not in the tuned model, left as they are: {_some(lost)}{_tie_note(tuned)}"] if lost else []),
    ]  # fmt: skip


def _tie_note(tuned: Base) -> str:
    tie = tie_of(tuned)
    return "" if tie is None else f" (the tuned model ties {tie.head} to {tie.embedding})"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
