"""fp8 weights with scale tensors: dequantised, merged, and quantised again at new scales of the same granularity.

W = codes * scale, with one scale per tensor, per row, or per block (128 x 128, as DeepSeek-V3 stores it).
"""

from __future__ import annotations

from math import ceil

from loratools.core.update import Array, Leaf
from loratools.errors import MismatchError, NumericsError, UnsupportedError
from loratools.io.base import Base
from loratools.io.quantised import FP8, scale_of
from loratools.io.write import TensorPlan
from loratools.linalg.namespace import all_finite, cast, dtype_name, namespace, up
from loratools.ops.fold import fold, square
from loratools.ops.placing import beside, is_away
from loratools.ops.rewrite import Block, Change, Figures
from loratools.ops.targets import Target

LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
BLOCK = 128


def is_scaled(base: Base, target: Target) -> bool:
    """True for an fp8 weight with a scale tensor beside it."""
    return target.source is not None and target.dtype in FP8 and scale_of(base, target.source) is not None


def changes(base: Base, target: Target, *, measure: bool) -> dict[str, Change]:
    """Return the changes of an fp8 weight and of its scale tensor; each computes the merge, so that neither waits.

    Memory: the parameter in fp32, a few times.
    """
    assert target.source is not None
    scale_name = scale_of(base, target.source)
    assert scale_name is not None
    if target.value is not None:
        raise UnsupportedError("an fp8 weight cannot be replaced by a stored one", parameter=target.name)
    scale, block = base.leaf(scale_name), block_of(base, base.shapes[target.source], base.shapes[scale_name])
    codes = TensorPlan(target.name, target.dtype, target.shape)
    scales = TensorPlan(scale_name, scale.dtype, scale.shape)
    source = base.leaf(target.source)

    def merge(leaf: Leaf | None) -> tuple[Array, Array, Figures]:
        assert leaf is not None
        u = target.terms[0].update
        w = dequantised(beside(leaf, u), beside(scale, u), block)
        folded = fold(w, [(t.weight, t.update) for t in target.terms])
        new_codes, new_scale = requantised(folded.value, scale, block, target.dtype)
        figures = Figures()
        if measure:
            lost = dequantised(new_codes, new_scale, block) - folded.value
            figures = Figures({"update": square(folded.change), "lost": square(lost), "base": square(w)})
        return new_codes, new_scale, figures

    def weight(leaf: Leaf | None, start: int, stop: int) -> tuple[Array, Figures]:
        new, _, figures = merge(leaf)
        return new, figures

    def rescale(leaf: Leaf | None, start: int, stop: int) -> tuple[Array, Figures]:
        return merge(source)[1], Figures()

    def always(block: Block) -> Change:
        plan = codes if block is weight else scales
        return Change(plan, source, lambda start, stop: block, whole=True, away=is_away(target.terms[0].update))

    return {target.name: always(weight), scale_name: always(rescale)}


def block_of(base: Base, shape: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, int]:
    """Return rows and columns that share a scale. Raises MismatchError where the shapes do not tell."""
    m, n = shape
    if scale in ((), (1,), (1, 1)):
        return m, n
    if scale in ((m,), (m, 1)):
        return 1, n
    said = (base.config.get("quantization_config") or {}).get("weight_block_size") or (BLOCK, BLOCK)
    if len(scale) == 2 and (ceil(m / said[0]), ceil(n / said[1])) == scale:
        return int(said[0]), int(said[1])
    raise MismatchError("the scales of an fp8 weight do not fit it", expected=f"weight {shape}", got=f"scales {scale}")


def dequantised(codes: Leaf | Array, scale: Leaf | Array, block: tuple[int, int]) -> Array:
    """Return codes * scale in fp32: codes (m, n), one scale per block."""
    w = up(codes)
    return w * _spread(up(scale), block, (w.shape[0], w.shape[1]))


def requantised(w: Array, scale: Leaf | Array, block: tuple[int, int], dtype: str) -> tuple[Array, Array]:
    """Return codes and scales of ``w`` (m, n): the largest value of a block becomes the largest code.

    Raises NumericsError where ``w`` is not finite.
    """
    if not all_finite(w):
        raise NumericsError("a merged value is not finite")
    xp = namespace(w)
    largest = _block_max(xp.abs(w), block)
    wanted = xp.where(largest > 0, largest / LARGEST[dtype], xp.ones_like(largest))
    stored = cast(wanted.reshape(tuple(scale.shape)), dtype_name(scale))
    spread = _spread(up(stored), block, (w.shape[0], w.shape[1]))
    codes = xp.clip(w / spread, -LARGEST[dtype], LARGEST[dtype])
    return cast(codes, dtype), stored


def _spread(scale: Array, block: tuple[int, int], shape: tuple[int, int]) -> Array:
    """Return the scale of every element, broadcastable to ``shape``."""
    xp = namespace(scale)
    rows, columns = ceil(shape[0] / block[0]), ceil(shape[1] / block[1])
    grid = scale.reshape(rows, columns)
    if (rows, columns) == (1, 1) or block == (1, shape[1]):
        return grid
    tall = xp.repeat(grid, block[0], axis=0)[: shape[0], :]
    return xp.repeat(tall, block[1], axis=1)[:, : shape[1]]


def _block_max(x: Array, block: tuple[int, int]) -> Array:
    """Return the largest element of every block, (rows of blocks, columns of blocks)."""
    xp = namespace(x)
    m, n = x.shape
    tall, wide = -m % block[0], -n % block[1]
    x = xp.concat([x, xp.zeros((tall, n), dtype=x.dtype, device=x.device)], axis=0) if tall else x
    x = xp.concat([x, xp.zeros((m + tall, wide), dtype=x.dtype, device=x.device)], axis=1) if wide else x
    grid = x.reshape((m + tall) // block[0], block[0], (n + wide) // block[1], block[1])
    return xp.max(grid, axis=(1, 3))
