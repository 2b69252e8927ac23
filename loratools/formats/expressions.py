"""The algebra of a manifest: how named tensors become an update. docs/manifest.md

An expression is the name of a tensor, or a table with one operation: ``{product = ["B", {diag = "s"}, "A"]}``. It is
put together from handles: nothing is read before the update is used. Products are formed in fp64 and kept in fp32
(fp64 where a tensor is), as factors wherever those are smaller than the matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

from loratools.core.update import Delta, Leaf
from loratools.errors import FormatError
from loratools.formats.matrices import (
    Value,
    added,
    krons,
    matrix,
    network,
    on_diagonal,
    reordered,
    reshaped,
    scaled,
    stacked,
    subbands,
    times,
    turned,
    vector,
)
from loratools.kinds.hadamard import Hadamard
from loratools.linalg.namespace import is_float

DEPTH = 32


@dataclass
class Scope:
    """The tensors that an expression may name, what its placeholders stand for, and which tensors it used."""

    leaves: Mapping[str, Leaf]
    bound: Mapping[str, str] = field(default_factory=dict)
    used: dict[str, Leaf] = field(default_factory=dict)

    def tensor(self, name: str) -> Leaf:
        """Return a tensor by its name, placeholders filled in; :class:`FormatError` where there is none."""
        key = filled(name, self.bound)
        if key not in self.leaves:
            got = f"{len(self.leaves)} tensors: {', '.join(list(self.leaves)[:3])}"
            raise FormatError("the manifest names a tensor that the weights lack", expected=key, got=got)
        leaf = self.leaves[key]
        if not is_float(leaf.dtype) or 0 in leaf.shape:
            raise FormatError("a factor is not of a floating dtype, or empty", got=f"{key}: {leaf.dtype} {leaf.shape}")
        self.used[key] = leaf
        return leaf


def filled(name: str, bound: Mapping[str, str]) -> str:
    """Return a name with its placeholders replaced: ``layers.{i}.q`` -> ``layers.3.q``."""
    return reduce(lambda text, item: text.replace(f"{{{item[0]}}}", item[1]), bound.items(), name)


def update_of(node: Any, scope: Scope) -> Delta:
    """Return the update that an expression means; :class:`FormatError` names an unknown operation or a misfit."""
    return matrix(evaluate(node, scope))


def names_in(node: Any) -> list[str]:
    """Return the tensor names of an expression, in order, placeholders and all."""
    if isinstance(node, str):
        return [node]
    if isinstance(node, list):
        return [name for part in node for name in names_in(part)]
    if not _is_table(node):
        return []
    said = [part for key, part in node.items() if key in _TAKES or (key == "by" and isinstance(part, str))]
    return [name for part in said for name in names_in(part)]


def evaluate(node: Any, scope: Scope, depth: int = 0) -> Value:
    """Return the value of an expression."""
    if isinstance(node, str):
        return scope.tensor(node)
    if not _is_table(node):
        raise FormatError("no expression", expected='"TENSOR" or {OPERATION = ...}', got=repr(node)[:80])
    if depth > DEPTH:
        raise FormatError("expressions inside each other", expected=f"at most {DEPTH}", got="more")
    names = [key for key in node if key in _OPERATIONS]
    if len(names) != 1 or (unknown := node.keys() - {names[0], *_OPERATIONS[names[0]].options}):
        got = ", ".join(unknown if len(names) == 1 else node)
        raise FormatError("not one known operation", expected=", ".join(_OPERATIONS), got=got or "nothing")
    operation = _OPERATIONS[names[0]]
    said = node[names[0]]
    if operation.several and (not isinstance(said, list) or not said):
        raise FormatError(f"{names[0]} takes a list of expressions", got=repr(said)[:80])
    parts = [evaluate(part, scope, depth + 1) for part in (said if operation.several else [said])]
    options = {key: _option(key, value, scope, depth) for key, value in node.items() if key != names[0]}
    return operation.run(parts, **options)


def _is_table(node: Any) -> bool:
    return isinstance(node, Mapping)


def _option(key: str, value: Any, scope: Scope, depth: int) -> Any:
    if key in ("left", "right"):
        if not isinstance(value, list):
            raise FormatError(f"{key} takes a list of expressions", got=repr(value)[:80])
        return [evaluate(part, scope, depth + 1) for part in value]
    return scope.tensor(value) if key == "by" and isinstance(value, str) else value


@dataclass(frozen=True)
class _Operation:
    run: Callable[..., Value]
    several: bool = False
    options: tuple[str, ...] = ()


_OPERATIONS: dict[str, _Operation] = {
    "product": _Operation(lambda parts: reduce(times, parts), several=True),
    "diag": _Operation(lambda parts: vector(parts[0])),
    "sum": _Operation(lambda parts: added(list(map(matrix, parts))), several=True),
    "kron": _Operation(krons, several=True),
    "hadamard": _Operation(lambda parts: reduce(Hadamard, map(matrix, parts)), several=True),
    "tucker": _Operation(lambda parts, left=(), right=(): network(parts[0], left, right), options=("left", "right")),
    "stack": _Operation(lambda parts: stacked(list(map(matrix, parts))), several=True),
    "beside": _Operation(lambda parts: turned(stacked([matrix(turned(p)) for p in parts])), several=True),
    "blocks": _Operation(lambda parts: on_diagonal(list(map(matrix, parts))), several=True),
    "wavelet": _Operation(
        lambda parts, family="haar", axes=None: subbands(
            parts[0], family, ["rows", "columns"] if axes is None else axes
        ),
        options=("family", "axes"),
    ),
    "scaled": _Operation(lambda parts, by=None: scaled(parts[0], by), options=("by",)),
    "transposed": _Operation(lambda parts: turned(parts[0])),
    "reshape": _Operation(lambda parts, shape=None: reshaped(parts[0], shape), options=("shape",)),
    "permute": _Operation(lambda parts, axes=None: reordered(parts[0], axes), options=("axes",)),
}
_TAKES = ("left", "right", *_OPERATIONS)  # what holds expressions
