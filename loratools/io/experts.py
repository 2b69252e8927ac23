"""Experts that a model file stores one by one, where its program holds them as one stacked parameter.

transformers 5 stacks the experts of most models on loading and takes them apart on saving: an adapter speaks of
``layers.0.mlp.experts.gate_up_proj`` (E, 2 i, h) where the file has ``layers.0.mlp.experts.7.gate_proj.weight`` and
``up_proj.weight``, or ``block_sparse_moe.experts.7.w1.weight`` and ``w3.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

Shapes = Mapping[str, tuple[int, ...]]
Apart = list[tuple[str, ...]]  # per expert, the tensors that make up its rows, in order

_PARTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "gate_proj": (("gate_proj",), ("w1",)),
    "up_proj": (("up_proj",), ("w3",)),
    "down_proj": (("down_proj",), ("w2",)),
}
_ONE = re.compile(r"(?P<module>.+)\.(?P<expert>\d+)\.(?P<leaf>\w+)\.weight")


def stored_apart(names: Iterable[str], shapes: Shapes) -> dict[str, Apart]:
    """Return stacked parameter -> its tensors in the file, for the names that are found there in one place only.

    All experts must be there, of equal matrices. Cost: linear in the number of names.
    """
    modules = _modules(shapes)
    found = {name: _apart(name, modules) for name in names}
    return {name: parts for name, parts in found.items() if parts and _equal(parts, shapes)}


def stacked_shape(parts: Apart, shapes: Shapes) -> tuple[int, int, int]:
    """Return (experts, rows, columns) of the parameter that the tensors make up."""
    return len(parts), sum(shapes[name][0] for name in parts[0]), shapes[parts[0][0]][1]


def _modules(shapes: Shapes) -> dict[str, dict[str, dict[int, str]]]:
    """Return module (as transformers 5 calls it) -> leaf -> expert -> name."""
    modules: dict[str, dict[str, dict[int, str]]] = {}
    for name in shapes:
        one = _ONE.fullmatch(name)
        if one is not None:
            leaves = modules.setdefault(_renamed(one["module"]), {})
            leaves.setdefault(one["leaf"], {})[int(one["expert"])] = name
    return modules


def _renamed(module: str) -> str:
    return f".{module}".replace(".block_sparse_moe.", ".mlp.")[1:]


def _apart(name: str, modules: Mapping[str, Mapping[str, Mapping[int, str]]]) -> Apart | None:
    wanted, _, parameter = name.rpartition(".")
    wanted = _renamed(wanted)
    alike = [m for m in modules if m == wanted or m.endswith(f".{wanted}") or wanted.endswith(f".{m}")]
    if len(alike) != 1:
        return None
    leaves = modules[alike[0]]
    known = [parts for parts in _PARTS.get(parameter, ()) if all(part in leaves for part in parts)]
    if len(known) != 1:
        return None
    experts = [leaves[part] for part in known[0]]
    numbers = range(len(experts[0]))
    if any(set(part) != set(numbers) for part in experts):
        return None
    return [tuple(part[e] for part in experts) for e in numbers]


def _equal(parts: Apart, shapes: Shapes) -> bool:
    sizes = {tuple(shapes[name] for name in expert) for expert in parts}
    return len(sizes) == 1 and all(len(shape) == 2 for shape in next(iter(sizes)))
