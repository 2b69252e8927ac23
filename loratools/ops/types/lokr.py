"""``--type lokr``: the nearest Kronecker product of every update."""

from __future__ import annotations

from loratools.core.adapter import Adapter
from loratools.errors import UsageError
from loratools.files import BaseLike
from loratools.leaf import Array
from loratools.linalg.namespace import namespace, up
from loratools.linalg.rsvd import Matrix, rsvd
from loratools.linalg.seeds import key_of
from loratools.ops.types.base import adapter_type
from loratools.ops.types.projected import Type, named, projected, shapes_of

POWER = 8  # of one singular triplet: enough for gaps of a few percent


@adapter_type("lokr")
def to_lokr(adapter: Adapter, base: BaseLike | None = None, *, factor: int = -1, seed: int = 0) -> Adapter:
    """LoKr: D = w1 (x) w2, the nearest one; ``factor`` is PEFT's decompose_factor (-1: near the square root).

    Rearranged with one block of D per row, a Kronecker product is a matrix of rank 1, so that the leading singular
    triplet gives the factors (Van Loan, Pitsianis 1993). Both are stored whole, at scale 1. Lossy; projecting again
    changes nothing. Cost: D is formed, then a few products with it.
    """
    if factor < 1 and factor != -1:
        raise UsageError("factor out of range", expected="-1 or at least 1", got=factor)
    adapter = named(adapter)
    sizes = {name: tuple(split(n, factor) for n in shape) for name, shape in shapes_of(adapter).items()}
    rank = max((max(pair[1] for pair in pairs) for pairs in sizes.values()), default=1)  # PEFT keeps w2 whole from half
    fields = {
        "r": rank, "alpha": rank, "decompose_factor": factor, "decompose_both": False, "use_effective_conv2d": False,
        "rank_dropout": 0.0, "module_dropout": 0.0, "init_weights": True, "rank_pattern": {}, "alpha_pattern": {},
    }  # fmt: skip

    def project(name: str, d: Array) -> dict[str, Array]:
        (a, _), (c, _) = sizes[name]
        w1, w2 = nearest_kronecker(d, a, c, seed=seed)
        return {"lokr_w1": w1, "lokr_w2": w2}

    return projected(adapter, base, Type("LOKR", fields), project)


def nearest_kronecker(d: Array, a: int, c: int, *, seed: int = 0) -> tuple[Array, Array]:
    """Return w1 (a, c), w2 (m / a, n / c) with the Kronecker product nearest to d (m, n); balanced, w1's largest > 0.

    |d - w1 (x) w2|_F is that of the best approximation of rank 1 of the rearranged d (a c, m n / (a c)).
    """
    xp, (m, n) = namespace(d), d.shape
    b, e = m // a, n // c
    blocks = xp.permute_dims(d.reshape(a, b, c, e), (0, 2, 1, 3)).reshape(a * c, b * e)
    u, s, vh = rsvd(Matrix(up(blocks)), 1, power=POWER, key=key_of(seed, "kronecker"))
    root = up(s[:1]) ** 0.5
    w1, w2 = (u[:, 0] * root).reshape(a, c), (vh[0, :] * root).reshape(b, e)
    flat = w1.reshape(-1)
    sign = 1.0 if float(flat[int(xp.argmax(xp.abs(flat)))]) >= 0 else -1.0
    return sign * w1, sign * w2


def split(size: int, factor: int) -> tuple[int, int]:
    """Return the two factors, the smaller first, into which PEFT splits a dimension.

    ``factor`` itself where it divides; else the divisor nearest to the square root from below, at most ``factor``.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor == -1 else factor
    best = max(m for m in range(1, int(size**0.5) + 1) if size % m == 0 and m <= max(limit, 1))
    return best, size // best
