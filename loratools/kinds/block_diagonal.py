"""BlockDiagonal: square blocks on a diagonal, also of interleaved coordinates; the turns of OFT, BOFT and RoAd."""

from __future__ import annotations

from typing import Self

from loratools.core import generic
from loratools.core.lazy import permuted
from loratools.core.routes import route
from loratools.core.update import Array, Delta, Leaf, Update, kind, namespace, shape_of, working_dtype
from loratools.errors import FormatError
from loratools.kinds.dense import Dense
from loratools.linalg import seeds
from loratools.linalg.namespace import up


@kind("block_diagonal")
class BlockDiagonal(Delta):
    """D = diagonal of blocks (c, b, b), of shape (c b, c b).

    ``spread`` > 1: the coordinates come in halves of blocks, and a block takes two halves that lie ``spread`` apart
    (b even, c a multiple of spread), as in one level of a butterfly (BOFT, arXiv:2311.06243) or a rotation of pairs.
    """

    blocks: Leaf | Array
    spread: int = 1

    def __post_init__(self) -> None:
        shape = shape_of(self.blocks)
        if len(shape) != 3 or shape[1] != shape[2]:
            raise FormatError("blocks on a diagonal are square", expected="(count, size, size)", got=shape)
        if self.spread < 1 or (self.spread > 1 and (shape[1] % 2 or shape[0] % self.spread)):
            raise FormatError("blocks cannot be spread that way", expected="even size, a divisor of their count",
                              got=f"spread {self.spread} of {shape}")  # fmt: skip

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """(count * size, count * size)."""
        count, size, _ = shape_of(self.blocks)
        return count * size, count * size

    def dense(self) -> Array:
        """Return the matrix formed; O(n^2 b)."""
        blocks = up(self.blocks, working_dtype(self.blocks))
        return self.matmul(namespace(blocks).eye(self.shape[0], dtype=blocks.dtype, device=blocks.device))

    def matmul(self, x: Array) -> Array:
        """Return D x; O(n b k)."""
        return self._product(x, transposed=False)

    def rmatmul(self, y: Array) -> Array:
        """Return D^T y; O(n b k)."""
        return self._product(y, transposed=True)

    def _product(self, x: Array, *, transposed: bool) -> Array:
        dtype = working_dtype(self.blocks, x)
        blocks, x = up(self.blocks, dtype), up(x, dtype)
        count, size, k = *shape_of(blocks)[:2], x.shape[1]
        xp = namespace(blocks, x)
        blocks = xp.matrix_transpose(blocks) if transposed else blocks
        if self.spread == 1:
            return (blocks @ x.reshape(count, size, k)).reshape(-1, k)
        groups, half = count // self.spread, size // 2
        met = xp.permute_dims(x.reshape(groups, 2, self.spread, half, k), (0, 2, 1, 3, 4)).reshape(count, size, k)
        turned = (blocks @ met).reshape(groups, self.spread, 2, half, k)
        return xp.permute_dims(turned, (0, 2, 1, 3, 4)).reshape(-1, k)

    @classmethod
    def example(cls, seed: int) -> Self:
        """Four blocks of 2 x 2 whose coordinates lie two apart."""
        return cls((seeds.uniform(seeds.key_of(seed, "block_diagonal"), 8, 2) - 0.5).reshape(4, 2, 2), 2)


@generic.svdvals.register(BlockDiagonal)
def _(u: BlockDiagonal) -> Array:
    """Return those of all blocks; O(n b^2)."""
    blocks = up(u.blocks, "float64")
    xp = namespace(blocks)
    return -xp.sort(-xp.linalg.svdvals(blocks).reshape(-1))


@route(BlockDiagonal, Dense, cost=10.0)
def _form(u: BlockDiagonal) -> Update:
    return Dense(u.dense())


@generic.transposed.register(BlockDiagonal)
def _(u: BlockDiagonal) -> BlockDiagonal:
    return BlockDiagonal(permuted(u.blocks, (0, 2, 1)), u.spread)
