"""Coats: updates whose difference depends on the base, W' = W + delta(W)."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, TypeVar

from loratools.core.update import Array, Update, is_tensor, shape_of, tensors, working_dtype
from loratools.errors import MismatchError
from loratools.linalg.namespace import down, dtype_name, is_float, up

U = TypeVar("U", bound=Update)


class Coat(Update):
    """An update that is a difference only together with its base; a subclass says :meth:`delta`."""

    def apply(self, w: Array | None) -> Array:
        """Return W + delta(W), rounded once to the dtype of ``w``."""
        base = self.checked(w)
        return down(base + self.delta(base).dense(), dtype_name(w))

    def checked(self, w: Array | None) -> Array:
        """Return the base parameter in fp32 (fp64 where it or a tensor of the update is); it must be there and fit."""
        if w is None or shape_of(w) != self.shape:
            got = "no base parameter" if w is None else shape_of(w)
            raise MismatchError(f"a {self.kind} update needs its base parameter", expected=self.shape, got=got)
        return up(w, working_dtype(w, *(t for _, t in tensors(self))))


def loaded(u: U, dtype: str) -> U:
    """Return an update whose floating tensors are in memory for arithmetic: what uses it often computes them once."""
    kind: Any = u  # every kind is a dataclass
    made: U = replace(kind, **{f.name: _loaded(getattr(u, f.name), dtype) for f in fields(kind)})
    return made


def _loaded(value: Any, dtype: str) -> Any:
    if isinstance(value, Update):
        return loaded(value, dtype)
    if isinstance(value, tuple):
        return tuple(_loaded(part, dtype) for part in value)
    return up(value, dtype) if is_tensor(value) and is_float(dtype_name(value)) else value
