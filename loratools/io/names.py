"""Finding an adapter's parameter names among a base model's.

Wrappers add and drop prefixes, and releases of transformers rename the trees of vision-language models. The rules are
tried from the surest to the weakest, and nothing is taken that could mean two things.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from loratools.errors import MismatchError

_SPELLINGS = (  # one part of a model, as different releases of transformers name it
    ("model.layers.", "model.language_model.layers.", "language_model.model.layers."),
    ("model.embed_tokens.", "model.language_model.embed_tokens.", "language_model.model.embed_tokens."),
    ("model.norm.", "model.language_model.norm.", "language_model.model.norm."),
    ("lm_head.", "language_model.lm_head."),
    ("visual.", "model.visual."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)
_SEGMENTS = ((".mlp.", ".block_sparse_moe."),)  # transformers 5 in memory, and model files of Mixtral and its kin
Rule = Callable[[str], str | None]


def resolve(names: Iterable[str], base: Iterable[str], optional: Iterable[str] = frozenset()) -> dict[str, str]:
    """Return adapter name -> base name, one to one.

    In this order: the names as they are; one prefix added to, or removed from, all of them; for each name the only
    base name that ends in it (or that it ends in), or that differs by a known renaming. Names in ``optional`` are left
    out of the result when the base lacks them. Cost: linear in the number of names.

    Raises MismatchError with the count and the first three names that are missing, that may mean several parameters,
    or that mean the same one.
    """
    wanted, known, may_lack = list(dict.fromkeys(names)), dict.fromkeys(base), set(optional)
    needed = [name for name in wanted if name not in may_lack] or wanted
    rule = _common_rule(needed, known) or _single_rule(known)
    found = {name: target for name in wanted if (target := rule(name)) is not None}
    missing = [name for name in wanted if name not in found and name not in may_lack]
    if missing:
        raise _missing(missing, len(wanted), known)
    _refuse_shared(found)
    return found


def _common_rule(needed: Sequence[str], known: dict[str, None]) -> Rule | None:
    """Return the one prefix rule that finds every needed name; exact first. None if there is none or several."""
    if all(name in known for name in needed):
        return lambda name: name if name in known else None
    candidates = [*_added(needed[0], known), *_removed(needed[0], known)]
    fitting = [rule for rule in candidates if all(rule(name) is not None for name in needed)]
    return fitting[0] if len(fitting) == 1 else None


def _added(first: str, known: dict[str, None]) -> Iterator[Rule]:
    for target in known:
        if target.endswith(f".{first}"):
            yield _prefixed(target[: -len(first)], known)


def _removed(first: str, known: dict[str, None]) -> Iterator[Rule]:
    for target in _suffixes(first):
        if target in known and target != first:
            yield _stripped(first[: -len(target)], known)


def _prefixed(prefix: str, known: dict[str, None]) -> Rule:
    return lambda name: prefix + name if prefix + name in known else None


def _stripped(prefix: str, known: dict[str, None]) -> Rule:
    def rule(name: str) -> str | None:
        rest = name.removeprefix(prefix)
        return rest if name.startswith(prefix) and rest in known else None

    return rule


def _single_rule(known: dict[str, None]) -> Rule:
    """Return the rule that judges each name by itself; a name that may mean several parameters finds none."""
    ending: dict[str, list[str]] = {}
    for target in known:
        for suffix in _suffixes(target):
            ending.setdefault(suffix, []).append(target)

    def rule(name: str) -> str | None:
        if name in known:
            return name
        found = dict.fromkeys([*ending.get(name, []), *(s for s in _suffixes(name) if s in known)])
        found = found or dict.fromkeys(other for other in _respelled(name) if other in known)
        return next(iter(found)) if len(found) == 1 else None

    return rule


def _suffixes(name: str) -> list[str]:
    """Return the dotted endings of at least two parts, the longest first: ``a.b.c`` -> ``a.b.c``, ``b.c``."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts) - 1)]


def _respelled(name: str) -> Iterator[str]:
    """Yield what other releases of transformers call the same parameter."""
    for spellings in _SPELLINGS:
        for old in spellings:
            if name.startswith(old):
                yield from (new + name.removeprefix(old) for new in spellings if new != old)
    yield from (name.replace(memory, file) for memory, file in _SEGMENTS if memory in name)


def _missing(missing: Sequence[str], count: int, known: dict[str, None]) -> MismatchError:
    return MismatchError(
        f"{len(missing)} of {count} parameters of the adapter are not in the base, or not in one place only",
        expected=f"names like {', '.join(list(known)[:3])}",
        got=", ".join(missing[:3]),
        hint=_tied_hint(missing, known) or "check that this is the base the adapter was trained on",
    )


def _tied_hint(missing: Sequence[str], known: dict[str, None]) -> str | None:
    embedding = next((name for name in known if name.endswith("embed_tokens.weight")), None)
    if embedding and any(name.endswith("lm_head.weight") for name in missing):
        return f"the base ties lm_head.weight to {embedding} and does not store it: untie them in the base first"
    return None


def _refuse_shared(found: dict[str, str]) -> None:
    owners: dict[str, str] = {}
    shared = [f"{name} and {owners[t]} -> {t}" for name, t in found.items() if owners.setdefault(t, name) != name]
    if shared:
        raise MismatchError(
            f"{len(shared)} parameters of the base are meant by two names of the adapter", got="; ".join(shared[:3])
        )
