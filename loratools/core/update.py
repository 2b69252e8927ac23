"""The noun: how one base parameter changes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from math import prod
from typing import Any, ClassVar, Self, TypeVar, dataclass_transform

from loratools.leaf import Array, Leaf
from loratools.linalg.namespace import down, dtype_name, namespace, up, working_dtype
from loratools.registry import Registry

KINDS: Registry[type[Update]] = Registry("loratools.kinds", "kind")
K = TypeVar("K", bound="Update")


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(field,))
def kind(name: str) -> Callable[[type[K]], type[K]]:
    """Class decorator: make a frozen dataclass, and register it under the name that files and reports use.

    Two updates are equal if they are the same object: whether arrays are equal is a question with many answers.
    """

    def register(cls: type[K]) -> type[K]:
        cls.kind = name
        made = dataclass(frozen=True, eq=False, repr=False)(cls)
        KINDS.add(name)(made)
        return made

    return register


class Update(ABC):
    """How one base parameter changes: W -> W'. ``shape`` is that of the stored base parameter.

    Fields of a kind are tensors (leaves or arrays), numbers, tuples of numbers, or other kinds; nothing else.
    """

    kind: ClassVar[str]
    shape: tuple[int, ...]

    def __repr__(self) -> str:
        said = (f"{name}={_told(getattr(self, name))}" for name in _field_names(type(self)))
        return f"{type(self).__name__}({', '.join(said)})"

    @abstractmethod
    def apply(self, w: Array | None) -> Array:
        """Return W' in the dtype of ``w``, computed in fp32 (fp64 for fp64 input); ``w`` is left as it is."""

    @abstractmethod
    def delta(self, w: Array) -> Delta:
        """Return W' - W as a base-free :class:`Delta`, given the base; a Delta returns itself."""

    @classmethod
    @abstractmethod
    def example(cls, seed: int) -> Self:
        """Return a small instance: the sample of the contract tests and of the documentation."""


class Delta(Update):
    """An additive update W' = W + dense(); a linear operator on the matrix view (shape[0], product of the rest)."""

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrix view; a vector is one column."""
        return self.shape[0], prod(self.shape[1:])

    def matrix(self) -> Array:
        """Return D as its matrix view, formed."""
        return self.dense().reshape(self.matrix_shape)

    @abstractmethod
    def matmul(self, x: Array) -> Array:
        """Return D x for x (columns, k) -> (rows, k), without forming D where the kind allows."""

    @abstractmethod
    def rmatmul(self, y: Array) -> Array:
        """Return D^T y for y (rows, k) -> (columns, k), without forming D where the kind allows."""

    @abstractmethod
    def dense(self) -> Array:
        """Return D in ``self.shape``, at least fp32."""

    def apply(self, w: Array | None) -> Array:
        """Return W + D, rounded once to the dtype of ``w``."""
        if w is None:
            return self.dense()
        return down(up(w, working_dtype(w)) + self.dense(), dtype_name(w))

    def delta(self, w: Array) -> Delta:
        """Return self: the update does not depend on the base."""
        return self


def tensors(update: Update) -> Iterator[tuple[str, Leaf | Array]]:
    """Yield (dotted field name, tensor) of an update and of the kinds inside it, in field order."""
    for name in _field_names(type(update)):
        value = getattr(update, name)
        if type(value) in _NUMBERS:  # asked first, of every update again and again
            continue
        if is_tensor(value):
            yield name, value
        elif isinstance(value, Update | tuple):
            yield from _inside(name, value)


_NUMBERS = frozenset((float, int, bool, str, type(None)))


@cache
def _field_names(cls: type[Update]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(cls))  # type: ignore[arg-type]  # every kind is a dataclass


def _inside(name: str, value: Update | tuple[Any, ...]) -> Iterator[tuple[str, Leaf | Array]]:
    """Yield the tensors of a kind, or of a tuple of kinds, under its name."""
    if isinstance(value, Update):
        yield from ((f"{name}.{inner}", t) for inner, t in tensors(value))
    elif value and isinstance(value[0], Update):
        for i, part in enumerate(value):
            yield from _inside(f"{name}.{i}", part)


def is_tensor(value: Any) -> bool:
    """True for leaves and arrays, false for numbers, tuples and kinds."""
    return isinstance(value, Leaf) or (hasattr(value, "dtype") and hasattr(value, "shape") and not is_dataclass(value))


def _told(value: Any) -> str:
    """Return a tensor's dtype and shape, and the repr of anything else."""
    return f"{dtype_name(value)}{list(value.shape)}" if is_tensor(value) else repr(value)


def nbytes(update: Update) -> int:
    """Return the bytes of all tensors of an update in their storage dtypes."""
    return sum(tensor_bytes(t) for _, t in tensors(update))


def tensor_bytes(t: Leaf | Array) -> int:
    """Return the bytes of one tensor in its storage dtype."""
    return int(t.nbytes)


def shape_of(t: Leaf | Array) -> tuple[int, ...]:
    """Return the shape as a plain tuple of ints, for leaves and arrays of both libraries."""
    return tuple(int(n) for n in t.shape)


__all__ = [
    "KINDS", "Array", "Delta", "Leaf", "Update", "is_tensor", "kind", "namespace", "nbytes", "shape_of",
    "tensor_bytes", "tensors", "working_dtype",
]  # fmt: skip
