"""What a profile is made of: rules that look at a file, and a recipe for the file that its program loads right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from loratools.consumers.subject import Subject
from loratools.registry import Registry

FAILS = "would not load"
IDLE = "would load and do nothing"
STRENGTH = "would be applied at the wrong strength"
PARTLY = "would be partly ignored"
UNSURE = "depends on what the file does not say"
NOTE = "to know"
LEVELS: Mapping[str, str] = {
    FAILS: "error", IDLE: "error", STRENGTH: "error", PARTLY: "error", UNSURE: "warning", NOTE: "note",
}  # fmt: skip
FIX = "loratools check {path} --for {consumer} --fix -o OUT"
FIX_BASE = "loratools check {path} --for {consumer} --base BASE --fix -o OUT"
MERGE = "loratools merge BASE {path} -o OUT   # fold it into the base instead"
DORA = "loratools merge BASE {path} -o OUT   # or the nearest LoRA: convert --to peft --type lora --base BASE"
RECOVER = "loratools recover {path} --initial DIR -o OUT   # or --base BASE (PiSSA, OLoRA, KaSA): plain LoRA"


class Evidence(NamedTuple):
    """What a predicate saw in the file, in words, and the modules or tensors that it concerns."""

    text: str
    modules: tuple[str, ...] = ()


Predicate = Callable[[Subject], Evidence | None]


@dataclass(frozen=True)
class Rule:
    """One way to be refused or misread. ``id`` is stable; ``formats`` are those that it judges (empty: any).

    ``mend`` is the command that mends it, with ``{path}``, ``{consumer}`` and ``{format}`` to fill in.
    """

    id: str
    effect: str
    find: Predicate
    reason: str
    source: str
    mend: str = FIX
    formats: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """How ``--fix`` writes for a consumer: the format, and what it may contain.

    ``kinds`` are the kinds of update that the consumer applies; the others move into a file of their own. ``one_scale``
    asks for one scale said once, ``uniform`` for one rank, ``ranks`` for one of these where there is one large enough.
    ``takes(name, shape)`` says which parameters the consumer adapts.
    """

    format: str
    kinds: tuple[str, ...] = ("lowrank",)
    one_scale: bool = False
    uniform: bool = False
    ranks: tuple[int, ...] = ()
    takes: Callable[[str, tuple[int, ...]], bool] = lambda name, shape: True
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Profile:
    """One program: the version described, where that is said, whether its behaviour was run, formats, rules, recipe.

    ``converts`` are formats that the program's own converter takes: their rules say what that converter would do.
    ``foreign`` are the rules for files of any other format, which mostly fail and sometimes do nothing without a word.
    """

    name: str
    title: str
    version: str
    source: str
    ran: bool
    reads: tuple[str, ...]
    rules: tuple[Rule, ...]
    recipe: Recipe
    converts: tuple[str, ...] = ()
    foreign: tuple[Rule, ...] = ()

    def judge(self, subject: Subject) -> Iterator[Finding]:
        """Yield what every rule finds; a format that the program cannot read is the only finding."""
        known = subject.format in self.reads
        yield from () if known else self._found(self.foreign or (_format_rule(self),), subject)
        if known or subject.format in self.converts:
            yield from self._found(self.rules, subject)

    def _found(self, rules: Iterable[Rule], subject: Subject) -> Iterator[Finding]:
        for rule in rules:
            evidence = rule.find(subject) if not rule.formats or subject.format in rule.formats else None
            if evidence is not None:
                yield _finding(self, rule, evidence, subject)


@dataclass(frozen=True)
class Finding:
    """One thing that would go wrong, where it was seen, why, who says so, and the command that mends it."""

    id: str
    consumer: str
    effect: str
    evidence: str
    modules: tuple[str, ...]
    reason: str
    source: str
    mend: str

    @property
    def level(self) -> str:
        """``error``, ``warning`` or ``note``; notes do not fail a check."""
        return LEVELS[self.effect]


CONSUMERS: Registry[Profile] = Registry("loratools.consumers", "consumer")


def _finding(profile: Profile, rule: Rule, evidence: Evidence, subject: Subject) -> Finding:
    mend = rule.mend.format(path=subject.path, consumer=profile.name, format=profile.recipe.format)
    return Finding(
        f"{profile.name}/{rule.id}", profile.name, rule.effect, evidence.text, evidence.modules, rule.reason,
        rule.source, mend,
    )  # fmt: skip


def _format_rule(profile: Profile) -> Rule:
    return Rule("format", FAILS, format_of, f"{profile.title} reads {', '.join(profile.reads)}", profile.source)


def format_of(subject: Subject) -> Evidence:
    """Say what the file is."""
    return Evidence(f"the file is of format {subject.format or 'unknown'}")


def some(names: Sequence[str], of: int | None = None) -> Evidence:
    """Return evidence that names the first three, and counts."""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return Evidence(f"{len(names)}{'' if of is None else f' of {of}'}: {shown}", tuple(names))


def found(names: Sequence[str], of: int | None = None) -> Evidence | None:
    """Return evidence that names the first three, or None where there is none."""
    return some(names, of) if names else None
