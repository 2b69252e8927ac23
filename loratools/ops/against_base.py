"""Figures of an update against its base matrix: size, overlap with the base's leading subspaces, intruders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loratools.core import generic
from loratools.core.update import Delta, tensors
from loratools.files import cast
from loratools.kinds.dense import Dense
from loratools.kinds.lowrank import low_rank
from loratools.leaf import Array
from loratools.linalg.intruders import Cosines, max_cosines
from loratools.linalg.krylov import ANGLE, Leading, Transposed, leading
from loratools.linalg.namespace import dtype_name, namespace, up
from loratools.linalg.rsvd import Operator
from loratools.linalg.seeds import Key
from loratools.ops.base_side import BaseSide, frobenius

SHARP = 1e-5
"""Accuracy of singular vectors in radians where a decision hangs on it."""

CURVE = tuple(round(0.1 * i, 1) for i in range(1, 10))
"""Thresholds of the curve of intruder counts."""


@dataclass(frozen=True)
class Asked:
    """What is looked for: ``k`` leading vectors, threshold ``eps``, the right-hand ones too if ``both_sides``.

    ``angle``: how well the singular vectors must be known, in radians.
    """

    k: int = 10
    eps: float = 0.5
    both_sides: bool = False
    key: Key = (0, 0)
    angle: float = ANGLE


class Tuned:
    """W0 + D as an operator, without forming it."""

    def __init__(self, w: Array, d: Operator) -> None:
        self.w, self.d, self.like, self.shape = w, d, w, tuple(w.shape)

    def matmul(self, x: Array) -> Array:
        """Return (W0 + D) x."""
        return self.w @ x + self.d.matmul(x)

    def rmatmul(self, y: Array) -> Array:
        """Return (W0 + D)^T y."""
        return self.w.mT @ y + self.d.rmatmul(y)


def matrix_of(delta: Delta, *, turned: bool) -> Operator:
    """Return a delta, in memory and in fp32 (fp64 if it is), as an operator in the orientation (out, in)."""
    wide = any(dtype_name(t) == "float64" for _, t in tensors(delta))
    op: Operator = generic.Operator(cast(delta, "float64" if wide else "float32"))
    return Transposed(op) if turned else op


def size_figures(delta: Delta, op: Operator, side: BaseSide, key: Key) -> dict[str, Any]:
    """Return the update's size relative to the base, and its share in the base's leading subspaces.

    ``overlap_left``: share of |D|_F^2 in the span of the base's k leading left singular vectors; a random direction has
    k / out. ``mixing``: |D|_2 over the median distance of the base's leading singular values; far above 1, ordinary
    singular vectors mix, too.
    """
    size = delta_norm(delta)
    spectral = float(generic.svdvals(delta)[0]) if low_rank(delta) is not None else _top(op, key)
    left, right = (_share(seen, size) for seen in (op.rmatmul(side.u), op.matmul(side.vh.mT)))
    k, (m, n) = int(side.s.shape[0]), op.shape[-2:]
    return {
        "update_norm": size,
        "relative_norm": _ratio(size, side.frobenius),
        "relative_spectral_norm": _ratio(spectral, float(side.s[0])),
        "base_frobenius_norm": side.frobenius,
        "base_spectral_norm": float(side.s[0]),
        "overlap_left": left,
        "overlap_right": right,
        "overlap_left_random": k / m,
        "overlap_right_random": k / n,
        "mixing": _ratio(spectral, _spacing(side.s)),
    }


def delta_norm(delta: Delta) -> float:
    """Return |D|_F."""
    return frobenius(delta.dense().reshape(delta.matrix_shape)) if isinstance(delta, Dense) else generic.norm(delta)


def intruder_figures(w: Array, op: Operator, asked: Asked) -> dict[str, Any]:
    """Return the intruder dimensions of W0 + D: w (m, n) in the orientation (out, in), D as operator.

    The j-th left singular vector of W0 + D (j <= k) is an intruder if its largest |cosine| with all thin left singular
    vectors of W0 is below eps. With ``both_sides`` the right ones are judged likewise. See :mod:`linalg.intruders`.
    """
    top, left = leading_cosines(w, op, asked)
    figures = {
        **_side_figures(top, left, asked.eps),
        "tuned_singular_values": _floats(top.s),
        "intruder_residual": float(namespace(top.residual).max(top.residual)),
        "intruder_curve": curve(left),
        "method": left.method,
        "steps": left.steps,
    }
    if not asked.both_sides:
        return figures
    right = max_cosines(w.mT, top.vh.mT, eps=asked.eps, key=asked.key, angle=_right_angle(top))
    left_flags, right_flags = left.intruders(asked.eps), right.intruders(asked.eps)
    return {
        **figures,
        "intruders_right": int(right_flags.sum()),
        "intruders_both": int((left_flags & right_flags).sum()),
        "intruder_index_right": _positions(right_flags),
        "max_cosine_upper_right": _floats(right.upper),
        "max_cosine_lower_right": _floats(right.lower),
        "certain_right": bool(right.certain(asked.eps).all()),
    }


def leading_cosines(w: Array, op: Operator, asked: Asked) -> tuple[Leading, Cosines]:
    """Return the leading triples of W0 + D, and the largest cosines of their left vectors with the base's."""
    k = min(asked.k, *w.shape)
    top = leading(Tuned(w, op), k, key=asked.key, angle=asked.angle)
    found = max_cosines(w, top.u, eps=asked.eps, key=asked.key, angle=top.angle)
    if not bool(found.certain(asked.eps).all()):  # a cosine very close to eps: the vectors need to be known better
        top = leading(Tuned(w, op), k, key=asked.key, angle=SHARP)
        found = max_cosines(w, top.u, eps=asked.eps, key=asked.key, angle=top.angle)
    return top, found


def no_intruders(k: int, m: int, n: int) -> dict[str, Any]:
    """Return the figures of a zero update: W0 + D is W0, and nothing need be computed."""
    ones = [1.0] * min(k, m, n)
    return {
        "intruders": 0,
        "intruder_index": [],
        "intruder_values": [],
        "max_cosine_upper": ones,
        "max_cosine_lower": ones,
        "certain": True,
        "intruder_curve": [{"eps": eps, "at_least": 0, "at_most": 0} for eps in CURVE],
        "method": "zero",
        "steps": 0,
    }


def curve(found: Cosines) -> list[dict[str, float]]:
    """Return per threshold how many vectors are intruders for certain, and how many may be."""
    return [
        {
            "eps": eps,
            "at_least": int((found.upper + found.slack < eps).sum()),
            "at_most": int((found.lower - found.slack < eps).sum()),
        }
        for eps in CURVE
    ]


def _side_figures(top: Leading, found: Cosines, eps: float) -> dict[str, Any]:
    flags = found.intruders(eps)
    where = _positions(flags)
    return {
        "intruders": len(where),
        "intruder_index": where,
        "intruder_values": [float(top.s[j - 1]) for j in where],
        "max_cosine_upper": _floats(found.upper),
        "max_cosine_lower": _floats(found.lower),
        "cosine_slack": _floats(found.slack),
        "certain": bool(found.certain(eps).all()),
    }


def _right_angle(top: Leading) -> Array:
    """Return what is known of the right vectors: v = A^T u / s spreads the error of u by at most s_1 / s."""
    xp = namespace(top.s)
    return xp.clip(top.angle * top.s[0] / xp.where(top.s > 0, top.s, top.s[0] or 1.0), 0.0, 1.6)


def _positions(flags: Array) -> list[int]:
    """Return the positions of the intruders, counted from 1 for the largest singular value."""
    return [j + 1 for j, flag in enumerate(flags) if bool(flag)]


def _share(seen: Array, size: float) -> float:
    return min(1.0, (frobenius(seen) / size) ** 2) if size else 0.0


def _top(op: Operator, key: Key) -> float:
    return float(leading(op, 1, key=key).s[0])


def _spacing(s: Array) -> float:
    """Return the median distance of neighbouring leading singular values."""
    steps = sorted(_floats(s[:-1] - s[1:]))
    return steps[len(steps) // 2] if steps else 0.0


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _floats(x: Array) -> list[float]:
    return [float(value) for value in up(x, "float64")]
