"""Inner products of differences that are cheaper to form than to multiply with: what coats make of a base in memory."""

from __future__ import annotations

from loratools.core import generic
from loratools.core.update import Delta
from loratools.errors import MismatchError
from loratools.kinds.lowrank import LowRank
from loratools.linalg.namespace import dtype_name, namespace, up


def inner_formed(u: Delta, v: Delta) -> float:
    """Return <U, V>, both formed (a base as large is in memory already), rows in their precision, their sum in fp64."""
    if u.matrix_shape != v.matrix_shape and u.shape != v.shape:
        raise MismatchError("inner product of different shapes", expected=u.shape, got=v.shape)
    if isinstance(v, LowRank):
        return float(generic.inner(v, u))
    first = u.matrix()
    second = first if v is u else up(v.matrix(), dtype_name(first))
    return float(up(namespace(first).linalg.vecdot(first, second), "float64").sum())
