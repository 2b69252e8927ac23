"""Truncation of a product by randomised SVD: LoRA-Squeeze's way, beside the exact one, with its error measured.

Never needed for factors, whose optimum costs less (:func:`loratools.linalg.factored.truncate`); here for parity with
arXiv:2602.10993 (oversampling 10, two power iterations) and as an independent second.
"""

from __future__ import annotations

from typing import NamedTuple

from loratools.errors import NumericsError
from loratools.leaf import Array, Leaf
from loratools.linalg.factored import Choose, Truncation, capped, checked_factors, frobenius
from loratools.linalg.namespace import all_finite, down, dtype_name, namespace, up
from loratools.linalg.rsvd import rsvd
from loratools.linalg.seeds import Key
from loratools.linalg.select import energy_kept, tail_error


class Product(NamedTuple):
    """``b @ a`` as an operator, never formed."""

    like: Array
    a: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """(m, n)."""
        return int(self.like.shape[0]), int(self.a.shape[1])

    def matmul(self, x: Array) -> Array:
        """Return b (a x)."""
        return self.like @ (self.a @ x)

    def rmatmul(self, y: Array) -> Array:
        """Return a^T (b^T y)."""
        return self.a.mT @ (self.like.mT @ y)


def truncate(
    b: Leaf | Array,
    a: Leaf | Array,
    choose: Choose,
    *,
    key: Key,
    scale: float = 1.0,
    oversample: int = 10,
    power: int = 2,
) -> Truncation:
    """Cut ``D = scale * b @ a`` to a rank by :func:`rsvd`; ``choose`` is asked with zeros, for the spectrum is unknown.

    The result is an orthogonal projection of D, so its error is known afterwards without another look:
    |D - D'|^2 = |D|^2 - sum of the kept s^2. ``singular_values`` holds the kept ones, and one that stands for all the
    rest (its square is theirs). Exact to rounding where R <= k + oversample. Cost 4 (power + 1) (m + n) R (k +
    oversample) flops. Raises as :func:`loratools.linalg.factored.truncate`.
    """
    b, a = checked_factors(b, a, scale)
    if not (all_finite(b) and all_finite(a)):
        raise NumericsError("a factor is not finite")
    xp, count = namespace(b, a), min(*b.shape, *a.shape)
    k = capped(choose)(xp.zeros(count, dtype=xp.float64, device=b.device))
    u, s, vh = rsvd(Product(b, a), k, oversample=oversample, power=power, key=key)
    s = abs(scale) * up(s, "float64")
    whole = frobenius(b, a, scale=scale)
    rest = max(whole**2 - float(xp.sum(s**2)), 0.0) ** 0.5 if k < count else 0.0
    alive = s > 1e-7 * s[0]
    root = xp.sqrt(xp.where(alive, s, 0.0))
    tall = up(u, "float64") * (root * (-1.0 if scale < 0 else 1.0))
    wide = up(vh, "float64") * xp.where(alive, root, 1.0)[:, None]
    values = xp.concat([s, xp.full((1,), rest, dtype=xp.float64, device=b.device)]) if k < count else s
    dtype = dtype_name(b)
    kept = energy_kept(values, k), tail_error(values, k)
    return Truncation(down(tall, dtype), down(wide, dtype), values, k, *kept, "rsvd")
