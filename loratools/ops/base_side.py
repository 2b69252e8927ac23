"""What diagnosing needs of a base parameter alone: its norm and leading singular triples; kept on disk if asked.

The cache is keyed by content: sha256 of dtype, shape and bytes. It never has to be told that a model changed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from loratools.core.update import shape_of
from loratools.errors import FileError, LoratoolsError, NumericsError
from loratools.io.read import open_bundle
from loratools.io.write import TensorPlan, write_safetensors
from loratools.leaf import Array
from loratools.linalg.krylov import leading
from loratools.linalg.namespace import dtype_name, namespace, raw_bytes, to_numpy, up
from loratools.linalg.seeds import Key
from loratools.ops.placing import placed

VERSION = 1
ANGLE = 0.02
"""Accuracy of the leading subspace in radians: overlaps are reported to two digits."""


@dataclass(frozen=True)
class BaseSide:
    """``frobenius`` norm, and the k leading singular triples: u (m, k), s (k,) fp64, vh (k, n)."""

    frobenius: float
    u: Array
    s: Array
    vh: Array


def base_side(w: Array, k: int, key: Key) -> BaseSide:
    """Compute the base's side of a matrix w (m, n), fp32 or fp64. Raises NumericsError where it is not finite."""
    size = frobenius(w)
    if not size < float("inf"):
        raise NumericsError("the base weights are not finite")
    found = leading(w, k, key=key, angle=ANGLE)
    return BaseSide(size, found.u, found.s, found.vh)


def cached_base_side(w: Array, k: int, key: Key, folder: Path | None, content: str) -> BaseSide:
    """Return :func:`base_side` from the cache, or compute it and put it there. A damaged entry is computed anew."""
    if folder is None:
        return base_side(w, k, key)
    path = folder / f"{content}-top{k}-v{VERSION}.safetensors"
    found = _read(path, w) if path.exists() else None
    if found is None:
        found = base_side(w, k, key)
        _write(path, found)
    return found


def content_of(stored: Array) -> str:
    """Return the sha256 of a parameter as stored: dtype, shape and bytes."""
    digest = hashlib.sha256(f"{dtype_name(stored)} {shape_of(stored)}\n".encode())
    digest.update(raw_bytes(stored))
    return digest.hexdigest()


def frobenius(w: Array) -> float:
    """Return |w|_F of a matrix, rows summed in blocks: right to fp32's eps whatever the size."""
    norm = namespace(w).linalg.matrix_norm
    blocks = (w[start : start + 256, :] for start in range(0, w.shape[0], 256))
    return float(sum(float(norm(block)) ** 2 for block in blocks) ** 0.5)


def _read(path: Path, like: Array) -> BaseSide | None:
    try:
        tensors = open_bundle(path).tensors
        u, s, vh, size = (tensors[name].read() for name in ("u", "s", "vh", "frobenius"))
    except (LoratoolsError, KeyError):
        return None
    u, s, vh = (placed(x, like) for x in (u, s, vh))
    return BaseSide(float(size[0]), u, s, vh) if u.shape[0] == like.shape[0] else None


def _write(path: Path, side: BaseSide) -> None:
    like = up(side.s, "float64")
    found = {"frobenius": like[:1] * 0 + side.frobenius, "s": like, "u": side.u, "vh": side.vh}
    tensors = {name: to_numpy(x) for name, x in found.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError("cannot make the cache directory", file=path.parent, got=error.strerror) from error
    plan = [TensorPlan(name, dtype_name(x), shape_of(x)) for name, x in tensors.items()]
    write_safetensors(path, plan, iter(tensors.items()), overwrite=True)
