"""``peft_type: LOKR``: D = alpha / r kron(w1, w2), each whole or a product (arXiv:2309.14859, PEFT's ``LoKrConfig``).

PEFT divides by the config's r also where both factors are whole.
"""

from __future__ import annotations

from math import prod

from loratools.core.lazy import computed
from loratools.core.update import Array, Delta
from loratools.errors import FormatError
from loratools.formats.peft.tuner import Module, Size, Tuner
from loratools.formats.peft.types import peft_type
from loratools.kinds.dense import Dense
from loratools.kinds.kronecker import Kronecker
from loratools.kinds.lowrank import LowRank
from loratools.kinds.tucker import Tucker
from loratools.linalg.namespace import namespace, up, working_dtype


@peft_type("LOKR")
class LoKr(Tuner):
    """Kronecker products; rank that of w1 times that of w2."""

    type = "LOKR"
    leaves = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")

    def size(self, m: Module) -> Size:
        """Return (out, in[, *kernel]), in flat over a kernel where w2 is a product of two."""
        p, q = _outer(m).shape, _inner_size(m)
        return p[0] * q[0], p[1] * q[1], *q[2:]

    def weight(self, m: Module) -> Kronecker | LowRank:
        """Return the Kronecker product."""
        p, scale = _outer(m), m.scale(m.rank())
        if "lokr_w2" in m and len(m["lokr_w2"].shape) == 3:
            return _line(m, p, scale)
        return Kronecker(p, _inner(m, p.shape), scale)


def _outer(m: Module) -> Delta:
    return Dense(m["lokr_w1"]) if "lokr_w1" in m else LowRank(m["lokr_w1_a"], m["lokr_w1_b"])


def _inner_size(m: Module) -> tuple[int, ...]:
    if "lokr_w2" in m:
        return m["lokr_w2"].shape
    a, b = m["lokr_w2_a"].shape, m["lokr_w2_b"].shape
    return (a[1], b[1], *m.kernel(m["lokr_t2"].shape[2:])) if "lokr_t2" in m else (a[0], b[1])


def _inner(m: Module, outer: tuple[int, ...]) -> Delta:
    """Return w2 with the kernel of the weight."""
    if "lokr_w2" in m:
        return Dense(m["lokr_w2"])
    a, b = m["lokr_w2_a"], m["lokr_w2_b"]
    if "lokr_t2" in m:
        core = m["lokr_t2"]
        return Tucker(core.reshape((*core.shape[:2], *m.shape[2:])), a.T, b)
    inner = m.shape[1] // outer[1]
    if b.shape[1] != inner * prod(m.shape[2:]):
        raise FormatError("w1 and w2 do not make up the weight", expected=m.shape, got=(outer, a.shape, b.shape))
    return LowRank(a, b, 1.0, (a.shape[0], inner, *m.shape[2:]))


def _line(m: Module, p: Delta, scale: float) -> LowRank:
    """Return the change of a Conv1d with a whole w2 (o2, i2, k), formed when read: it is no Kronecker product.

    PEFT takes ``torch.kron`` of two and three axes, which aligns them at the end, and then reshapes: what lies in
    memory as (o2, o1, i2, i1, k) is read as (out, in, k). Its factors are the matrix and an identity.
    """
    w2, (out, n) = m["lokr_w2"], m.matrix_shape
    dtype = working_dtype(w2)

    def formed() -> Array:
        return (p.dense()[None, :, None, :, None] * up(w2, dtype)[:, None, :, None, :]).reshape(out, n)

    def identity() -> Array:
        return namespace(up(w2, dtype)).eye(min(out, n), dtype=up(w2, dtype).dtype)

    whole, one = computed((out, n), formed, dtype), computed((min(out, n),) * 2, identity, dtype)
    return LowRank(one, whole, scale, m.shape) if out <= n else LowRank(whole, one, scale, m.shape)
