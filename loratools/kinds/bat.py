"""Bat: every row of blocks of the base times a block of its own, plus that block (Bone's "bat", arXiv:2409.15371)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from loratools.core.coat import Coat
from loratools.core.update import Array, Delta, Leaf, kind, namespace, shape_of, working_dtype
from loratools.errors import FormatError
from loratools.linalg import seeds
from loratools.linalg.namespace import up


@kind("bat")
class Bat(Coat):
    """W'_pq = W_pq + W_pq M_p + M_p, W (out, in) cut into blocks of r x r; ``blocks`` (out / r, r, r) are the M_p."""

    blocks: Leaf | Array
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        blocks = shape_of(self.blocks)
        square = len(blocks) == 3 and blocks[1] == blocks[2]
        if not square or blocks[0] * blocks[1] != self.shape[0] or self.shape[1] % blocks[1]:
            raise FormatError("the blocks do not cut the parameter", expected=self.shape, got=blocks)

    def delta(self, w: Array) -> Delta:
        """Return the difference as an operator."""
        base = self.checked(w)
        return BatDelta(base, up(self.blocks, working_dtype(base, self.blocks)))

    @classmethod
    def example(cls, seed: int) -> Self:
        """A 4 x 6 parameter in blocks of 2 x 2."""
        return cls((seeds.uniform(seeds.key_of(seed, "bat"), 4, 2) - 0.5).reshape(2, 2, 2), (4, 6))


@dataclass(frozen=True)
class BatDelta(Delta):
    """D_pq = (W_pq + 1) M_p, block by block."""

    kind: ClassVar[str] = "bat delta"
    base: Array
    blocks: Array

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the base parameter."""
        return shape_of(self.base)

    def dense(self) -> Array:
        """Return D in ``shape``; O(out in r)."""
        count, r, _ = shape_of(self.blocks)
        w = self.base.reshape(count, r, -1, r)
        xp = namespace(w)
        w = xp.permute_dims(w, (0, 2, 1, 3)) + xp.eye(r, dtype=w.dtype, device=w.device)
        return xp.permute_dims(w @ self.blocks[:, None, :, :], (0, 2, 1, 3)).reshape(self.shape)

    def matmul(self, x: Array) -> Array:
        """Return D x; O(out in k): M_p on every stretch of x, then the rows of blocks of W."""
        count, r, _ = shape_of(self.blocks)
        dtype = working_dtype(self.base, x)
        w, blocks, x = up(self.base, dtype), up(self.blocks, dtype), up(x, dtype)
        xp, k = namespace(w, x), x.shape[1]
        stretches = x.reshape(1, -1, r, k)
        turned = (blocks[:, None, :, :] @ stretches).reshape(count, -1, k)
        alone = blocks @ xp.sum(stretches, axis=1)
        return (w.reshape(count, r, -1) @ turned + alone).reshape(-1, k)

    def rmatmul(self, y: Array) -> Array:
        """Return D^T y; O(out in k)."""
        count, r, _ = shape_of(self.blocks)
        dtype = working_dtype(self.base, y)
        w, blocks, y = up(self.base, dtype), up(self.blocks, dtype), up(y, dtype)
        xp, k = namespace(w, y), y.shape[1]
        rows = y.reshape(count, r, k)
        met = (xp.matrix_transpose(w.reshape(count, r, -1)) @ rows).reshape(count, -1, r, k) + rows[:, None, :, :]
        return xp.sum(xp.matrix_transpose(blocks)[:, None, :, :] @ met, axis=0).reshape(-1, k)

    @classmethod
    def example(cls, seed: int) -> Self:
        """The difference that the example of :class:`Bat` makes to a random base."""
        return cls(seeds.uniform(seeds.key_of(seed, "base"), 4, 6) - 0.5, Bat.example(seed).blocks)
