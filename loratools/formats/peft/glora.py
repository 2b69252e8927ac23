"""``peft_type: GLORA``: W' = W + W o A + B, b' = b + b o D + E + W C (arXiv:2306.07967, PEFT's ``GloraConfig``).

A and B are of low rank (``Xd`` (out, r), ``Xu`` (r, in)), a column ``X`` (out, 1) or a number ``X`` (1,); C is
(in, 1), a product or whole; D and E are vectors or numbers. What a config leaves out has no tensors, or ``zeros``.
W C is computed from the base that the file is read with.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from loratools.core.lazy import computed
from loratools.core.update import Array, Leaf, Update, namespace
from loratools.errors import FormatError
from loratools.formats.peft.tuner import Module, Size, Tuner
from loratools.formats.peft.types import peft_type
from loratools.kinds.dense import Dense
from loratools.kinds.lowrank import LowRank
from loratools.kinds.modulated import Modulated
from loratools.kinds.scaled import Scaled
from loratools.kinds.together import Together
from loratools.linalg.namespace import up

A, B, C, D, E = (f"glora_{path}" for path in "ABCDE")


@peft_type("GLORA")
class Glora(Tuner):
    """Weights modulated and shifted, biases too."""

    type = "GLORA"
    leaves = tuple(f"{path}.{part}" for path in (A, B, C, D, E) for part in ("Xd", "Xu", "X", "zeros"))

    def size(self, m: Module) -> Size:
        """Return out and in, as far as A and B are more than numbers."""
        for path in (A, B):
            if f"{path}.Xd" in m:
                return m[f"{path}.Xd"].shape[0], m[f"{path}.Xu"].shape[1]
            if f"{path}.X" in m and len(m[f"{path}.X"].shape) == 2:
                return m[f"{path}.X"].shape[0], None
        return None, None

    def weight(self, m: Module) -> Update | None:
        """Return W o A + B."""
        times, plus = _matrix(m, A), _matrix(m, B)
        parts: list[Update] = [Modulated(times)] if times is not None else []
        return _all([*parts, *([plus] if plus is not None else [])])

    def bias(self, m: Module) -> Update | None:
        """Return b o D + E + W C, where the module has a bias."""
        shape = m.bias_shape
        if shape is None:
            if m.model.base is None and any(f"{path}.{x}" in m for path in (C, D, E) for x in ("X", "Xd")):
                m.base_leaf("bias")  # raises: a change of the bias is not passed over
            return None
        parts: list[Update] = []
        if (gain := _vector(m, D)) is not None:
            parts.append(Scaled(computed(shape, lambda: 1.0 + _spread(gain, shape)), shape))
        if (plus := _vector(m, E)) is not None:
            parts.append(Dense(computed(shape, lambda: _spread(plus, shape))))
        if (mixed := _inputs(m)) is not None:
            w = m.base_leaf()
            parts.append(Dense(computed(shape, lambda: (up(w) @ mixed()).reshape(shape))))
        return _all(parts)


def _all(parts: list[Update]) -> Update | None:
    return Together(tuple(parts)) if parts else None


def _matrix(m: Module, path: str) -> LowRank | None:
    """Return A or B as a difference of the weight's shape; None where the config leaves it out."""
    out, n = m.matrix_shape
    if f"{path}.Xd" in m or f"{path}.Xu" in m:
        return LowRank(m[f"{path}.Xd"], m[f"{path}.Xu"])
    if (x := _vector(m, path)) is None:
        return None
    if x.shape not in ((1,), (out, 1)):
        raise FormatError(f"{path}.X is neither a column nor a number", expected=(out, 1), got=x.shape)
    ones = computed((1, n), lambda: namespace(up(x)).ones((1, n), dtype=up(x).dtype))
    return LowRank(computed((out, 1), lambda: _spread(x, (out, 1))), ones)


def _vector(m: Module, path: str) -> Leaf | None:
    return m[f"{path}.X"] if f"{path}.X" in m else None  # noqa: SIM401 - no mapping


def _inputs(m: Module) -> Callable[[], Array] | None:
    """Return the function that computes C (in, 1); None where the config leaves it out."""
    if f"{C}.Xd" in m or f"{C}.Xu" in m:
        left, right = m[f"{C}.Xd"], m[f"{C}.Xu"]
        return lambda: up(left) @ up(right)
    x = _vector(m, C)
    return None if x is None else lambda: up(x).reshape(-1, 1)


def _spread(x: Leaf, shape: tuple[int, ...]) -> Array:
    """Return a vector, or a number repeated, in this shape."""
    value = up(x)
    return value.reshape(shape) if prod(x.shape) == prod(shape) else namespace(value).broadcast_to(value, shape)
