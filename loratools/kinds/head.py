"""Head: the leading singular triplets of the base kept, the rest replaced, as OSF does (arXiv:2504.07097)."""

from __future__ import annotations

from typing import Self

from loratools.core.coat import Coat
from loratools.core.generic import need_delta, transposed
from loratools.core.update import Array, Delta, kind
from loratools.errors import FormatError
from loratools.kinds.lowrank import LowRank
from loratools.kinds.sum import Sum
from loratools.linalg.dense import thin_svd


@kind("head")
class Head(Coat):
    """W' = W_k + D, W_k the best approximation of W of rank ``kept`` (the signs of the vectors do not matter)."""

    added: Delta
    kept: int

    def __post_init__(self) -> None:
        if not 0 <= self.kept < min(self.added.matrix_shape):
            expected = f"0 to {min(self.added.matrix_shape) - 1}"
            raise FormatError("so many singular values leave none to replace", expected=expected, got=self.kept)

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the base parameter."""
        return self.added.shape

    def delta(self, w: Array) -> Delta:
        """Return D - (W - W_k), of rank at most min(m, n) - kept more than D's. Cost: one SVD of W."""
        u, s, vh = thin_svd(self.checked(w).reshape(self.added.matrix_shape))
        k = self.kept
        return Sum((self.added, LowRank(u[:, k:] * s[k:], vh[k:, :], -1.0, self.shape)))

    @classmethod
    def example(cls, seed: int) -> Self:
        """The two leading of five triplets of a 5 x 7 parameter."""
        return cls(LowRank.example(seed), 2)


@transposed.register(Head)
def _(u: Head) -> Head:
    return Head(need_delta(transposed(u.added)), u.kept)
