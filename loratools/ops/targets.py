"""Which tensor of a base becomes what under which updates: matched and checked by headers, before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from loratools.core.adapter import Adapter
from loratools.core.update import Array, Update
from loratools.errors import LoratoolsError, MismatchError, UsageError
from loratools.io.base import Base
from loratools.kinds.rebased import Rebased
from loratools.kinds.replace import Replace
from loratools.kinds.replace_rows import ReplaceRows
from loratools.linalg.namespace import dtype_name, is_float, namespace, raw_bytes, up
from loratools.ops.experts import one_by_one, refuse_unmergeable
from loratools.ops.tied import Tie, must_untie, tie_of

_DIFFER = "two adapters replace one parameter by different values"
_DIFFER_HINT = "leave one of them out, or fuse the adapters first"


@dataclass(frozen=True)
class Term:
    """One update of a parameter with its weight; ``adapter`` counts the inputs from 0."""

    weight: float
    update: Update
    adapter: int


@dataclass(frozen=True)
class Target:
    """A tensor to be written: out of the base's ``source`` (None: new), a stored ``value``, and ``terms``.

    The terms change the base's parameter, or the value where the adapter brought it for them (``on_value``).
    """

    name: str
    source: str | None
    shape: tuple[int, ...]
    dtype: str
    terms: tuple[Term, ...] = ()
    value: Replace | None = None
    on_value: bool = False

    @property
    def kind(self) -> str:
        """The kinds of all updates, as reports name them."""
        kinds = [t.update.kind for t in self.terms]
        whole = [] if self.value is None else ["rebased" if self.on_value else "replace"]
        return "+".join(dict.fromkeys(whole if self.on_value else [*kinds, *whole])) or "copy"


@dataclass(frozen=True)
class Targets:
    """All tensors that change, by name; what to tell about them; and what config.json has to say instead."""

    changed: Mapping[str, Target]
    remarks: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)


def targets(base: Base, adapters: Sequence[Adapter], weights: Sequence[float], *, untie: bool = False) -> Targets:
    """Match every update with its parameter and check shapes and dtypes; nothing of the base is read.

    Raises MismatchError (the first three and the count) for names and shapes that do not fit, for two replacements
    that differ, and for tied weights that would have to part; UsageError for a replacement at a weight other than 1.
    """
    found: dict[str, list[Term]] = {}
    tie = tie_of(base)
    for i, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        for name, update in _resolved(base, adapter, tie.head if tie else None).items():
            found.setdefault(name, []).append(Term(weight, update, i))
    apart = tie is not None and must_untie(tie, found, together=_together(found, tie, adapters), untie=untie)
    if tie is not None and not apart and tie.head not in base:
        found.pop(tie.head, None)  # an equal replacement of the shared tensor
    changed = {name: _target(base, name, terms, tie.embedding if tie else None) for name, terms in found.items()}
    if tie is not None and apart and tie.head not in changed:
        changed[tie.head] = _copied(base, tie, changed.get(tie.embedding))
    _check_shapes(base, changed)
    return Targets(changed, tuple(_remarks(base, changed, apart)), _config(base, changed, apart))


def _resolved(base: Base, adapter: Adapter, tied_head: str | None) -> dict[str, Update]:
    """Return base name -> update; replacements may be new names, and so may the head of a tie."""
    refuse_unmergeable(adapter)
    adapter = one_by_one(adapter, base)
    optional = {name for name, u in adapter.items() if isinstance(u, Replace)}
    heads = {
        name for name in adapter if tied_head is not None and name.endswith(tied_head.rpartition(".")[0] + ".weight")
    }
    try:
        names = base.resolve(adapter, optional | heads)
    except LoratoolsError as error:
        raise error.at(file=adapter.meta.path) from None
    shared = {name: tied_head for name in heads if name not in names and tied_head is not None}
    return {{**shared, **names}.get(name, name): update for name, update in adapter.items()}


def _together(found: Mapping[str, list[Term]], tie: Any, adapters: Sequence[Adapter]) -> bool:
    embedding, head = found.get(tie.embedding, []), found.get(tie.head, [])
    if head:
        both = [*embedding, *head]
        return bool(embedding) and all(isinstance(t.update, Replace) for t in both) and _all_equal(both)
    return all(
        isinstance(t.update, ReplaceRows) or adapters[t.adapter].meta.config.get("ensure_weight_tying")
        for t in embedding
    )


def _copied(base: Base, tie: Tie, embedding: Target | None) -> Target:
    """Return the head that was tied: the embedding as it was before its updates, be it the base's or the adapter's."""
    if embedding is not None and embedding.on_value:
        return replace(embedding, name=tie.head, terms=(), on_value=False)
    return Target(tie.head, tie.embedding, base.shapes[tie.embedding], base.dtypes[tie.embedding])


def _target(base: Base, name: str, terms: Sequence[Term], tied: str | None) -> Target:
    if len(terms) == 1 and terms[0].weight == 1 and isinstance(terms[0].update, Rebased) and name in base:
        whole = terms[0].update
        inner = (replace(terms[0], update=whole.update),)
        return Target(name, name, whole.shape, base.dtypes[name], inner, Replace(whole.value), on_value=True)
    stored = [t for t in terms if isinstance(t.update, Replace)]
    value = stored[0].update if stored else None
    _check_weights(name, terms)
    if not _all_equal(stored):
        raise MismatchError(_DIFFER, parameter=name, hint=_DIFFER_HINT)
    source = name if name in base else None if value is not None or tied is None else tied
    rows = [t for t in terms if isinstance(t.update, ReplaceRows)]
    rest = (*_united(name, rows), *(t for t in terms if not isinstance(t.update, Replace | ReplaceRows)))
    shape = value.shape if value is not None else base.shapes[source or name]
    dtype = base.dtypes[source] if source is not None else dtype_name(value.value)  # type: ignore[union-attr]
    return Target(name, source, shape, dtype, rest, value if isinstance(value, Replace) else None)


def _check_weights(name: str, terms: Sequence[Term]) -> None:
    for t in terms:
        if isinstance(t.update, Replace | ReplaceRows) and t.weight != 1:
            raise UsageError(
                "what is stored whole replaces the base's: it has no weight",
                parameter=name,
                expected="weight 1",
                got=t.weight,
            )


def _united(name: str, terms: Sequence[Term]) -> tuple[Term, ...]:
    """Return stored rows of several adapters as one update. Raises MismatchError where two of one row differ."""
    if len(terms) < 2:
        return tuple(terms)
    rows: dict[int, Array] = {}
    for t in terms:
        assert isinstance(t.update, ReplaceRows)
        values = up(t.update.rows, "float64")
        for place, i in enumerate(t.update.index):
            if i in rows and not bool(namespace(values).all(rows[i] == values[place, ...])):
                raise MismatchError(_DIFFER, parameter=name, got=f"row {i}", hint=_DIFFER_HINT)
            rows[i] = values[place, ...]
    xp, first = namespace(next(iter(rows.values()))), terms[0].update
    united = ReplaceRows(xp.stack(list(rows.values())), tuple(rows), first.shape)
    return (Term(1.0, united, terms[0].adapter),)


def _all_equal(terms: Sequence[Term]) -> bool:
    values = [t.update.value for t in terms if isinstance(t.update, Replace)]
    if len({(tuple(v.shape), dtype_name(v)) for v in values}) > 1:
        return False
    return len(values) < 2 or all(raw_bytes(v) == raw_bytes(values[0]) for v in values[1:])


def _check_shapes(base: Base, changed: Mapping[str, Target]) -> None:
    wrong = [
        f"{t.name}: base {base.shapes.get(t.source or '', t.shape)}, adapter {term.update.shape}"
        for t in changed.values()
        for term in t.terms
        if term.update.shape != t.shape
        or (t.source is not None and not t.on_value and base.shapes[t.source] != term.update.shape)
    ]
    if wrong:
        raise MismatchError(
            f"{len(wrong)} of {len(changed)} updates have another shape than their parameter",
            file=base.path,
            got="; ".join(wrong[:3]),
            hint="check that this is the base the adapter was trained on",
        )
    for t in changed.values():
        if not is_float(t.dtype):
            raise MismatchError("the base parameter is no floating tensor", parameter=t.name, got=t.dtype)


def _remarks(base: Base, changed: Mapping[str, Target], apart: bool) -> list[str]:
    new = [t.name for t in changed.values() if t.source is None]
    resized = [t.name for t in changed.values() if t.source is not None and base.shapes[t.source] != t.shape]
    return [
        *([f"new in the model, not in the base: {', '.join(new[:3])} ({len(new)})"] if new else []),
        *([f"resized: {', '.join(resized)}; take the tokenizer from the adapter"] if resized else []),
        *(["input embedding and output head are stored separately now (tie_word_embeddings: false)"] if apart else []),
    ]


def _config(base: Base, changed: Mapping[str, Target], apart: bool) -> dict[str, Any]:
    said: dict[str, Any] = {"tie_word_embeddings": False} if apart else {}
    rows = {base.shapes[t.source][0]: t.shape[0] for t in changed.values() if t.source and t.shape}
    size = base.config.get("vocab_size")
    if isinstance(size, int) and rows.get(size, size) != size:
        said["vocab_size"] = rows[size]
    return said
