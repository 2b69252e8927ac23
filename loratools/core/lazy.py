"""Tensors rearranged when they are read: nothing is loaded before it is used."""

from __future__ import annotations

from collections.abc import Callable

from loratools.core.update import Array, Leaf, namespace, shape_of

Tensor = Leaf | Array


def lazily(t: Tensor, shape: tuple[int, ...], change: Callable[[Array], Array]) -> Tensor:
    """Return ``change(t)``, of the given shape and the same dtype; of a leaf, the handle that applies it on reading."""
    if isinstance(t, Leaf):
        return Leaf(shape, t.dtype, lambda out: change(t.read(out)))
    return change(t)


def computed(shape: tuple[int, ...], compute: Callable[[], Array], dtype: str = "float32") -> Leaf:
    """Return the handle of a tensor that is computed, at this shape and dtype, when it is read."""
    return Leaf(shape, dtype, lambda out: compute())


def reshaped(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor in another shape, row-major."""
    return t.reshape(shape)


def permuted(t: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return a tensor with its axes in another order."""
    shape = shape_of(t)
    return lazily(t, tuple(shape[i] for i in axes), lambda x: namespace(x).permute_dims(x, axes))


def widened(t: Tensor, axis: int, size: int) -> Tensor:
    """Return a tensor padded with zeros to ``size`` along ``axis``."""
    shape = shape_of(t)
    if shape[axis] == size:
        return t
    gap = tuple(size - n if i == axis else n for i, n in enumerate(shape))

    def pad(x: Array) -> Array:
        xp = namespace(x)
        return xp.concat([x, xp.zeros(gap, dtype=x.dtype, device=x.device)], axis=axis)

    return lazily(t, tuple(size if i == axis else n for i, n in enumerate(shape)), pad)


def block_diagonal(t: Tensor, blocks: int) -> Tensor:
    """Return the block-diagonal matrix of ``blocks`` equal stretches of rows: (m, n) -> (m, blocks * n)."""
    m, n = shape_of(t)

    def spread(x: Array) -> Array:
        xp = namespace(x)
        eye = xp.eye(blocks, dtype=x.dtype, device=x.device)
        return (eye[:, None, :, None] * x.reshape(blocks, m // blocks, 1, n)).reshape(m, blocks * n)

    return lazily(t, (m, blocks * n), spread)


def repeated(t: Tensor, times: int) -> Tensor:
    """Return a matrix with every column repeated ``times``, side by side: (m, n) -> (m, n * times)."""
    m, n = shape_of(t)

    def repeat(x: Array) -> Array:
        return namespace(x).broadcast_to(x[:, :, None], (m, n, times)).reshape(m, n * times)

    return lazily(t, (m, n * times), repeat)
