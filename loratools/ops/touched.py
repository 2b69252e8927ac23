"""The base's values under the entries of sparse updates: kept for undoing, and hashed to know the base again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from loratools.core.update import Array, Delta, Leaf, Update
from loratools.errors import MismatchError
from loratools.kinds.sparse import Sparse
from loratools.kinds.sum import Sum
from loratools.linalg.namespace import dtype_name, raw_bytes

KEY = "loratools.touched"
"""Metadata key: sha256 (hex) of the base's dtypes and values at the entries, in the order of the updates."""


def sparse_part(u: Update) -> Sparse | None:
    """Return the sparse update, or the sparse part of a sum with a low-rank one."""
    if isinstance(u, Sum):
        return next((p for p in u.parts if isinstance(p, Sparse)), None)
    return u if isinstance(u, Sparse) else None


def values_at(flat: Array, weight: Leaf) -> Array:
    """Return the base's stored values at row-major positions; reads the parameter whole."""
    return weight.read().reshape(-1)[flat]


def with_base(u: Delta, weight: Leaf) -> Delta:
    """Return the update with the base's values at its entries."""
    if isinstance(u, Sum):
        return Sum(tuple(with_base(p, weight) if isinstance(p, Sparse) else p for p in u.parts))
    return replace(u, base=values_at(u.flat(), weight)) if isinstance(u, Sparse) else u


def hash_of(updates: Mapping[str, Update], weights: Mapping[str, Leaf]) -> str:
    """Return the sha256 (hex) of the base's values at the entries of every sparse update, in their order."""
    parts = ((name, sparse_part(u)) for name, u in updates.items())
    return hash_values((name, values_at(s.flat(), weights[name])) for name, s in parts if s is not None)


def hash_values(values: Iterable[tuple[str, Array]]) -> str:
    """Return the sha256 (hex) of named arrays: names, dtypes and bytes."""
    digest = hashlib.sha256()
    for name, array in values:
        digest.update(f"{name}\t{dtype_name(array)}\n".encode())
        digest.update(raw_bytes(array))
    return digest.hexdigest()


def forgotten(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return metadata without a hash that speaks of other entries."""
    return {key: value for key, value in metadata.items() if key != KEY}


def check_shape(name: str, shape: tuple[int, ...], weight: Leaf, file: Path | None) -> None:
    """Raise MismatchError unless the base parameter has the update's shape."""
    if weight.shape != shape:
        raise MismatchError(
            "the adapter does not fit the base", file=file, parameter=name, expected=weight.shape, got=shape
        )
