"""Is a module's weight stored (out, in), as nn.Linear does, or (in, out), as GPT-2's Conv1D does?

The factors look alike in both cases; only merging differs. Shapes of the base decide where they are known, else the
config's ``fan_in_fan_out``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from loratools.errors import MismatchError
from loratools.formats.stored import CONV1D

Orientation = Literal["out_in", "in_out"]
Shape = tuple[int | None, int | None]
CONV1D_MODULES = ("c_attn", "c_proj", "c_fc", "q_attn")
"""The ``Conv1D`` of GPT-2 and its kin; their other modules are ``nn.Linear``."""


def orientations(
    shapes: Mapping[str, Shape], fan_in_fan_out: bool, stored: Mapping[str, tuple[int, ...]] | None
) -> dict[str, Orientation]:
    """Return module path -> orientation, for ``shapes`` path -> (out, in) and ``stored`` path -> shape in the base.

    A size may be None where the adapter does not tell it. A parameter that fits both ways, as a square one, follows its
    siblings (same last name) that fit one way only, else all others where they are (in, out). Raises
    :class:`MismatchError` where the base has neither orientation, or where siblings disagree.
    """
    said: Orientation = "in_out" if fan_in_fan_out else "out_in"
    if stored is None:
        return dict.fromkeys(shapes, said)
    seen = {path: _by_shape(path, shape, stored[path]) for path, shape in shapes.items()}
    by_type: dict[str, Orientation] = {}
    for path, orientation in seen.items():
        if orientation is not None and by_type.setdefault(_type(path), orientation) != orientation:
            raise MismatchError("modules of one type are stored in two orientations", parameter=path)
    decided = set(seen.values()) - {None}
    rest: Orientation = "in_out" if decided == {"in_out"} else said  # some types leave the flag of a Conv1D model false
    return {path: orientation or by_type.get(_type(path), rest) for path, orientation in seen.items()}


def by_model(path: str, model_type: object) -> Orientation | None:
    """Return the orientation that a model of this type gives the module, None where its type does not tell."""
    if model_type not in CONV1D:
        return None
    return "in_out" if _type(path) in CONV1D_MODULES else "out_in"


def contradicted(turned: Mapping[str, Orientation], fan_in_fan_out: bool) -> str | None:
    """Return a remark where the base's shapes contradict ``fan_in_fan_out``; ``turned`` is path -> orientation."""
    other: Orientation = "out_in" if fan_in_fan_out else "in_out"
    paths = [path for path, orientation in turned.items() if orientation == other]
    if not paths:
        return None
    said, stored = str(fan_in_fan_out).lower(), "(out, in)" if fan_in_fan_out else "(in, out)"
    return (
        f"fan_in_fan_out is {said}, but the base stores {paths[0]} as {stored}"
        f"{f' ({len(paths)} modules)' if len(paths) > 1 else ''}: the base counts, for PEFT too"
    )


def _by_shape(path: str, shape: Shape, stored: tuple[int, ...]) -> Orientation | None:
    straight, turned = fits(shape, stored), fits(shape[::-1], stored)
    if not straight and not turned:
        raise MismatchError("the adapter does not fit the base", parameter=f"{path}.weight", expected=stored, got=shape)
    if straight and turned:
        return None
    return "out_in" if straight else "in_out"


def fits(shape: Shape, stored: tuple[int, ...]) -> bool:
    """Return whether a stored shape is that of (out, in), as far as these are known."""
    return len(stored) == 2 and all(n is None or n == m for n, m in zip(shape, stored, strict=True))


def _type(path: str) -> str:
    return path.rpartition(".")[2]
