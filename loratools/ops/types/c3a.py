"""``--type c3a``: the mean along every wrapped diagonal of square blocks."""

from __future__ import annotations

from math import gcd

from loratools.core.adapter import Adapter
from loratools.errors import UsageError
from loratools.files import BaseLike
from loratools.leaf import Array
from loratools.linalg.namespace import namespace
from loratools.ops.types.base import adapter_type
from loratools.ops.types.projected import Type, named, projected, shapes_of


@adapter_type("c3a")
def to_c3a(adapter: Adapter, base: BaseLike | None = None, *, block_size: int = 0) -> Adapter:
    """C3A: blocks of D become circulant, the mean of each wrapped diagonal; ``block_size`` 0: the largest for all.

    Circulant blocks form a linear space with the wrapped diagonals as orthogonal basis. Lossy; projecting again changes
    nothing. Cost: D is formed.
    """
    adapter = named(adapter)
    largest = gcd(*(n for shape in shapes_of(adapter).values() for n in shape))
    size = block_size or largest
    if size < 1 or largest % size:
        raise UsageError("block_size does not cut every module", expected=f"a divisor of {largest}", got=block_size)
    fields = {"block_size": size, "block_size_pattern": {}, "init_weights": True}

    def project(name: str, d: Array) -> dict[str, Array]:
        return {"c3a_kernel": d.shape[1] * circulant_means(d, size)}

    return projected(adapter, base, Type("C3A", fields), project)


def circulant_means(d: Array, b: int) -> Array:
    """Return k (m / b, n / b, b): entry t is the mean of d[i b + r, j b + (r + t) mod b] over r."""
    xp, (m, n) = namespace(d), d.shape
    blocks = xp.permute_dims(d.reshape(m // b, b, n // b, b), (0, 2, 1, 3))
    rolled = [xp.roll(blocks[:, :, r, :], -r, axis=-1) for r in range(b)]
    return sum(rolled[1:], rolled[0]) / b
