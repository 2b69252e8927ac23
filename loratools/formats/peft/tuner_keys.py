"""The keys of the types other than LORA: ``base_model.model.<module>.<leaf>``, and ``base_model.<leaf>`` for all.

A leaf is what a type's file declares: ``hada_w1_a``, ``oft_R.weight``, ``tinylora_v.*``. A raw state dict has the
adapter's name behind the first segment of a leaf (``hada_w1_a.default``, ``oft_R.default.weight``); PEFT takes it out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from loratools.formats.peft.keys import PREFIX, Key, unwrapped

MODEL = "base_model."


def parser(leaves: Sequence[str]) -> Callable[[str], Key]:
    """Return the function key -> :class:`Key` for a type with these leaves; path "" is the model itself.

    A key without any of them is a plain parameter, whose name is the path.
    """
    declared = [leaf.split(".") for leaf in leaves]
    heads = {leaf[0] for leaf in declared}

    def parse(key: str) -> Key:
        bare = unwrapped(key)
        ours = bare.startswith(MODEL) and not bare.startswith(PREFIX)
        bare = bare.removeprefix(PREFIX).removeprefix(MODEL)
        segments = bare.split(".")
        for at, segment in enumerate(segments):
            if segment in heads and (at or ours):
                found = _leaf(segments[at:], declared)
                if found is not None:
                    return Key(".".join(segments[:at]), *found)
        return Key(bare, "")

    return parse


def _leaf(rest: list[str], declared: Sequence[list[str]]) -> tuple[str, str | None] | None:
    """Return (leaf, adapter name left in), or None where ``rest`` is no declared leaf."""
    if any(_fits(rest, leaf) for leaf in declared):
        return ".".join(rest), None
    for at in range(1, len(rest)):
        without = rest[:at] + rest[at + 1 :]
        if any(_fits(without, leaf) for leaf in declared):
            return ".".join(without), rest[at]
    return None


def _fits(segments: list[str], leaf: list[str]) -> bool:
    return len(segments) == len(leaf) and all(map(fnmatchcase, segments, leaf))
