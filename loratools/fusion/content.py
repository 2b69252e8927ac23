"""A key made of what an update is: not of its position among the inputs, nor of the basis of its factors.

Random masks keyed by it are the same in whatever order adapters are given, and after B -> B G, A -> G^-1 A.
"""

from __future__ import annotations

from math import floor, log2

from loratools.core import generic
from loratools.core.update import Delta, namespace, tensors
from loratools.fusion.combine import Zero
from loratools.kinds.lowrank import LowRank, low_rank
from loratools.linalg import seeds
from loratools.linalg.namespace import up
from loratools.linalg.seeds import Key

PROBES = 8
STEPS = 64
"""Levels per unit: fine enough to tell adapters apart, 1e5 times coarser than the rounding of fp32 factors."""


def content_key(d: Delta, seed: int, stream: str = "") -> Key:
    """Return the key of an update's random stream: from its norm and eight bilinear probes x^T D y / |D|, quantised.

    Equal for equal updates in any gauge, up to a chance of about 1e-4 that rounding tips a level; O((m + n) r).
    """
    size = 0.0 if isinstance(d, Zero) else generic.norm(d)
    if size == 0.0:
        return seeds.key_of(seed, f"fuse:{stream}:zero")
    d = _double(d)
    m, n = d.matrix_shape
    like = next((t for _, t in tensors(d)), None)
    x, y = (up(seeds.signs(seeds.key_of(0, side), k, PROBES, like=like), "float64") for side, k in (("x", m), ("y", n)))
    probes = namespace(x, y).sum(x * up(d.matmul(y), "float64"), axis=0) / size
    levels = [floor(float(p) * STEPS + 0.5) for p in probes]
    return seeds.key_of(seed, f"fuse:{stream}:{floor(log2(size) * STEPS + 0.5)}:{levels}")


def _double(d: Delta) -> Delta:
    """Return the update with its factors in fp64, so that products do not depend on how sums are ordered."""
    low = low_rank(d)
    return d if low is None else LowRank(up(low.b, "float64"), up(low.a, "float64"), low.scale, low.shape)
