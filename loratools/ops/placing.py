"""The base's matrix of a part of an adapter: read, in fp32, in the library and on the device of the update."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from loratools.core.update import Array, Update, shape_of, tensors
from loratools.leaf import Leaf
from loratools.linalg.namespace import device_of, is_float, namespace, placed_like, to_numpy, up
from loratools.ops.parts import Part


class Placed(NamedTuple):
    """``stored`` as the base has it; ``w`` in fp32 (fp64 if so stored); ``matrix`` its (out, in) matrix view."""

    stored: Array
    w: Array
    matrix: Array


def base_matrix(part: Part, leaf: Leaf) -> Placed | None:
    """Read what a part acts on; None where there is no matrix of its shape to compare with (a head of another size)."""
    shape = shape_of(leaf)[part.expert is not None :]
    if not is_float(leaf.dtype) or shape != part.update.shape or len(shape) < 2 or min(shape[0], prod(shape[1:])) < 2:
        return None
    whole = leaf.read()
    stored = whole if part.expert is None else whole[part.expert]
    like = _in_memory(part.update)
    wide = up(stored, "float64" if leaf.dtype == "float64" else "float32")
    w = to_numpy(wide) if like is None else placed(wide, like)
    matrix = w.reshape(w.shape[0], -1)
    return Placed(stored, w, matrix.mT if part.turned else matrix)


def beside(x: Leaf | Array, update: Update) -> Leaf | Array:
    """Return a base parameter where the update is: in its library, on its device; as it is where both are NumPy's."""
    like = _in_memory(update)
    return x if like is None or namespace(like) is namespace() else placed_like(x, like)


def is_away(update: Update) -> bool:
    """Tell whether an update lies on another device than the files' data come to: on a GPU."""
    like = _in_memory(update)
    return like is not None and device_of(like) != "cpu"


def placed(x: Array, like: Array) -> Array:
    """Return an array in the library and on the device of ``like``; as it is where it is there already."""
    if namespace(x) is namespace(like) and device_of(x) == device_of(like):
        return x
    return namespace(like).asarray(to_numpy(x), device=like.device)


def _in_memory(update: Update) -> Array | None:
    return next((t for _, t in tensors(update) if not isinstance(t, Leaf)), None)
