"""Which parameter does a wrapper of ``target_parameters`` mean? Its name is not in the keys.

Wrappers of one module are nested: the innermost, under ``<module>.base_layer...``, is the parameter that the module's
class defines first. The base's shapes tell, or the order of definition where the names are those that every class of
transformers 5 defines in one order; what neither tells stays open.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

from loratools.core.update import Leaf
from loratools.errors import FormatError, MismatchError
from loratools.formats.peft.config import Settings, listed
from loratools.formats.peft.forms.form import A, B

WRAPPER = ".base_layer"
_DEFINED = ("gate_up_proj", "gate_proj", "w1", "up_proj", "w3", "w2", "down_proj")
_TRANSPOSED = ("gpt_oss", "aria", "openai_privacy_filter")  # model types whose experts are stored (E, in, out)

Parts = Mapping[str, tuple[str, Leaf]]
Size = tuple[int, int]  # (out, in) of one expert's factors
Shapes = Mapping[str, tuple[int, ...]]


def bare(path: str) -> str:
    """Return the path of the module inside all its wrappers."""
    while path.endswith(WRAPPER):
        path = path.removesuffix(WRAPPER)
    return path


def wrapped(modules: Mapping[str, Parts], config: Mapping[str, Any], said: Settings) -> dict[str, list[str]]:
    """Return wrapper path -> the parameters that it may mean, in order of definition where that is known.

    A wrapper is a module that ``target_parameters`` names; an entry without a module's name fits every module, and
    counts only where the module's rank shows more than one expert.
    """
    found: dict[str, list[str]] = {}
    for path, parts in modules.items():
        if A in parts and B in parts and len(parts[A][1].shape) == len(parts[B][1].shape) == 2:
            names = [n for n, module in _named(config, bare(path)) if module or _is_stacked(path, n, parts, said)]
            if names:
                found[path] = [f"{bare(path)}.{name}" for name in sorted(dict.fromkeys(names), key=place)]
    return found


def _named(config: Mapping[str, Any], module: str) -> list[tuple[str, str]]:
    """Return (parameter, module as written) of every entry of ``target_parameters`` that fits the module."""
    entries = [target.rpartition(".") for target in listed(config, "target_parameters")]
    return [(name, said) for said, _, name in entries if not said or f".{module}".endswith(f".{said}")]


def _is_stacked(path: str, name: str, parts: Parts, said: Settings) -> bool:
    return path.endswith(WRAPPER) or parts[A][1].shape[0] != said.rank_of()(f"{bare(path)}.{name}")


def place(name: str) -> int:
    """Return a number that orders parameters as the classes of transformers define them; others come last."""
    last = name.rpartition(".")[2]
    return _DEFINED.index(last) if last in _DEFINED else len(_DEFINED)


def meanings(
    modules: Mapping[str, Parts], names: Mapping[str, list[str]], shapes: Shapes
) -> dict[str, tuple[str, ...]]:
    """Return wrapper path -> the one parameter that it means, or all that it may mean.

    Raises :class:`FormatError` for more wrappers than names, :class:`MismatchError` where the base's shapes fit none.
    """
    found: dict[str, tuple[str, ...]] = {}
    for module in dict.fromkeys(bare(path) for path in names):
        levels = sorted((path for path in names if bare(path) == module), key=len, reverse=True)
        sizes = [(modules[path][B][1].shape[0], modules[path][A][1].shape[1]) for path in levels]
        known = [n for n in names[levels[0]] if not shapes or n in shapes]
        if len(known) < len(levels):
            what = "more nested wrappers than parameters that target_parameters names"
            raise FormatError(what, parameter=module, expected=", ".join(known), got=f"{len(levels)} wrappers")
        order = _order(known, sizes, shapes, module)
        found |= {path: (order[i],) if order else tuple(known) for i, path in enumerate(levels)}
    return found


def _order(names: Sequence[str], sizes: Sequence[Size], shapes: Shapes, module: str) -> Sequence[str] | None:
    """Return the names of the wrappers, innermost first, or None where several orders fit."""
    fitting = [order for order in permutations(names, len(sizes)) if _fits(order, sizes, shapes)]
    if shapes and not fitting:
        expected = "; ".join(f"{n} {shapes[n]}" for n in names)
        raise MismatchError("the adapter does not fit the base", parameter=module, expected=expected, got=list(sizes))
    if len(fitting) == 1:
        return fitting[0]
    defined = tuple(names) if len(names) == len(sizes) and all(place(n) < len(_DEFINED) for n in names) else None
    return defined if defined in fitting else None


def _fits(order: Sequence[str], sizes: Sequence[Size], shapes: Shapes) -> bool:
    if shapes:
        return all(set(shapes[n][-2:]) == set(size) for n, size in zip(order, sizes, strict=True))
    last = {name.rpartition(".")[2]: size for name, size in zip(order, sizes, strict=True)}
    if not {"gate_up_proj", "down_proj"} <= last.keys():
        return True
    up, down = last["gate_up_proj"], last["down_proj"]
    straight = up[1] == down[0] and up[0] == 2 * down[1]
    return straight or (up[0] == down[1] and up[1] == 2 * down[0])  # roles as PEFT 0.18 had them


def is_turned(size: Size, shape: tuple[int, ...], config: Mapping[str, Any], model_type: str | None) -> bool:
    """True if experts of (out, in) are stored (in, out), told by the base's shape, of square ones by PEFT's version.

    PEFT up to 0.18 read a stack (E, d1, d2) as in = d1, out = d2; since 0.19.1 as in = d2, out = d1, unless the module
    says that it is transposed; 0.19.0 the other way round. Raises :class:`MismatchError` where nothing tells.
    """
    if shape[-2] != shape[-1]:
        return size != tuple(shape[-2:])
    version = _version(config)
    if version is None or (version >= (0, 19, 0) and model_type is None):
        what = "square experts: which side is the input is told neither by shapes nor by version and model type"
        raise MismatchError(what, expected="peft_version in adapter_config.json, and a base with its config.json",
                            got=f"peft_version {config.get('peft_version')!r}, model_type {model_type!r}")  # fmt: skip
    if version < (0, 19, 0):
        return True
    return (model_type in _TRANSPOSED) == (version != (0, 19, 0))


def _version(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    import re

    found = re.match(r"(\d+)\.(\d+)\.(\d+)", str(config.get("peft_version") or ""))
    return None if found is None else tuple(int(part) for part in found.groups())
