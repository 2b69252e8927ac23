"""Rules for every consumer: what is wrong with a file whoever reads it."""

from __future__ import annotations

from loratools.consumers.base import IDLE, STRENGTH, UNSURE, Evidence, Rule, found
from loratools.consumers.subject import Subject

_OWN = "loratools"


def _nonfinite(subject: Subject) -> Evidence | None:
    return found(subject.nonfinite, len(subject.tensors))


def _untrained(subject: Subject) -> Evidence | None:
    if not subject.factors or len(subject.factors) < len(subject.modules) or len(subject.idle) < len(subject.factors):
        return None
    return Evidence(f"all {len(subject.factors)} modules have a zero factor", subject.idle)


def _unread(subject: Subject) -> Evidence | None:
    return None if subject.problem is None else Evidence(" ".join(str(subject.problem).split()))


def _unscaled(subject: Subject) -> Evidence | None:
    if subject.adapter is None or subject.adapter.meta.scaled:
        return None
    return Evidence(f"a {subject.format} file without a scale")


NONFINITE = Rule(
    "nonfinite",
    STRENGTH,
    _nonfinite,
    "NaN or infinity in a factor makes every output NaN or infinite",
    _OWN,
    "train again from the last good checkpoint; loratools info {path} lists the tensors",
)
UNTRAINED = Rule(
    "untrained",
    IDLE,
    _untrained,
    "a product with a zero factor is zero: the adapter was saved before it was trained",
    _OWN,
    "save the adapter after training",
)
UNREAD = Rule(
    "unread",
    UNSURE,
    _unread,
    "the tensors cannot be read by loratools, so that only the keys and the config are judged",
    _OWN,
    "loratools info {path}",
)
UNSCALED = Rule(
    "unscaled",
    UNSURE,
    _unscaled,
    "the file does not say how strongly its factors act",
    _OWN,
    "loratools convert {path} --to {format} --scale NUMBER -o OUT",
)
HEALTH = (UNREAD, UNSCALED, NONFINITE, UNTRAINED)
