"""Against a base: which of the consumer's modules the names hit, and what those that miss were probably meant to be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from loratools.consumers.base import FAILS, FIX_BASE, IDLE, PARTLY, Evidence, Rule
from loratools.consumers.subject import Subject
from loratools.io.base import Base

Tree = Callable[[Base], Mapping[str, tuple[int, ...]]]  # names that a consumer knows a base's parameters by -> shapes
_CLOSEST = 3
_RENAMED = (  # checkpoint -> module tree of vision-language models since transformers 4.52
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("visual.", "model.visual."),
    ("model.layers.", "model.language_model.layers."),
    ("model.embed_tokens.", "model.language_model.embed_tokens."),
    ("model.norm.", "model.language_model.norm."),
)


def stored(base: Base) -> Mapping[str, tuple[int, ...]]:
    """Return the names as the checkpoint has them."""
    return base.shapes


def both_trees(base: Base) -> Mapping[str, tuple[int, ...]]:
    """Return the checkpoint's names and those of the module tree that transformers 4.52 and later make of it."""
    if "vision_config" not in base.config:
        return base.shapes
    return {**base.shapes, **{renamed(name): shape for name, shape in base.shapes.items()}}


def renamed(name: str) -> str:
    """Return what transformers 4.52 and later call a parameter of an older vision-language checkpoint."""
    for old, new in _RENAMED:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def drift(
    tree: Tree = stored, *, none: str = IDLE, some: str = PARTLY, source: str, formats: tuple[str, ...] = ()
) -> tuple[Rule, ...]:
    """Return the rules about names (``none`` hits, ``some`` miss), and about shapes that do not fit."""
    all_miss, one_misses = (
        f"a name that the model does not have is {'an error' if effect == FAILS else 'skipped, mostly without a word'}"
        for effect in (none, some)
    )
    return (
        Rule("prefix-drift", none, lambda s: _missed(s, tree, whole=True), all_miss, source, FIX_BASE, formats),
        Rule("missing-modules", some, lambda s: _missed(s, tree, whole=False), one_misses, source, FIX_BASE, formats),
        Rule(
            "wrong-base", FAILS, lambda s: _misfit(s, tree), "the factors do not fit the base's parameters", source,
            "check the adapter with the base that it was trained on", formats,
        ),
    )  # fmt: skip


def hits(names: Mapping[str, str], known: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the module paths that are modules of the base, and those that are not."""
    tree = set(known)
    modules = {name.rpartition(".")[0] for name in tree}
    hit = [path for path, name in names.items() if name in tree or path in modules or path in tree]
    return hit, [path for path in names if path not in set(hit)]


def nearest(path: str, known: Iterable[str]) -> str | None:
    """Return the base module most like ``path``: of the same ending where there is one."""
    from difflib import get_close_matches

    modules = sorted({name.rpartition(".")[0] for name in known})
    last = path.rpartition(".")[2]
    alike = [m for m in modules if m.endswith(f".{last}")] or modules
    tails = [m for m in alike if m.split(".")[-4:] == path.split(".")[-4:]]
    return tails[0] if len(tails) == 1 else next(iter(get_close_matches(path, alike, 1, 0.0)), None)


def _missed(subject: Subject, tree: Tree, *, whole: bool) -> Evidence | None:
    if subject.base is None or not subject.modules:
        return None
    known = tree(subject.base)
    hit, miss = hits(subject.modules, known)
    if not known or not miss or whole != (not hit):  # a config alone names no parameters
        return None
    near = "; ".join(f"{path} (nearest: {nearest(path, known)})" for path in miss[:_CLOSEST])
    return Evidence(f"{len(hit)} of {len(subject.modules)} modules are in the base; missing: {near}", tuple(miss))


def _misfit(subject: Subject, tree: Tree) -> Evidence | None:
    if subject.base is None:
        return None
    shapes = tree(subject.base)
    wrong = [
        f"{name} {subject.updates[name].shape} on {shapes[name]}"
        for name in subject.modules.values()
        if name in shapes and subject.updates[name].shape not in (shapes[name], shapes[name][::-1])
    ]
    return Evidence(f"{len(wrong)}: {', '.join(wrong[:_CLOSEST])}", tuple(wrong)) if wrong else None
