"""``--type vera``: one vector per update between projections that all share."""

from __future__ import annotations

from math import sqrt

from loratools.core.adapter import Adapter
from loratools.errors import UsageError
from loratools.files import BaseLike
from loratools.leaf import Array
from loratools.linalg.namespace import namespace, up
from loratools.linalg.seeds import key_of, uniform
from loratools.ops.types.base import adapter_type
from loratools.ops.types.projected import Type, named, projected, shapes_of


@adapter_type("vera")
def to_vera(adapter: Adapter, base: BaseLike | None = None, *, rank: int | None = None, seed: int = 0) -> Adapter:
    """VeRA of --rank (256): D = B diag(d) A, d by least squares between random projections that the file holds.

    B and A are drawn once for all modules, as large as PEFT's and uniform as its own; the second vector is 1, so that
    the projection is linear and orthogonal. r numbers per module: expect to keep little. Cost: D is formed.
    """
    r = 256 if rank is None else rank
    if r < 1:
        raise UsageError("rank out of range", expected="at least 1", got=r)
    adapter = named(adapter)
    shapes = shapes_of(adapter)
    out, width = (max((shape[i] for shape in shapes.values()), default=1) for i in (0, 1))
    a = _drawn(seed, "vera.A", r, width)
    b = _drawn(seed, "vera.B", out, r)
    fields = {
        "r": r, "projection_prng_key": seed, "save_projection": True, "d_initial": 0.1, "vera_dropout": 0.0,
        "init_weights": True,
    }  # fmt: skip

    def project(name: str, d: Array) -> dict[str, Array]:
        m, n = d.shape
        xp = namespace(d)
        mine = least_squares_diagonal(d, b[:m, :], a[:, :n])
        shared = {"base_model.vera_A": a, "base_model.vera_B": b}
        return {"vera_lambda_d": mine, "vera_lambda_b": xp.ones((m,), dtype=xp.float32), **shared}

    return projected(adapter, base, Type("VERA", fields, conv1d=True), project)


def least_squares_diagonal(d: Array, b: Array, a: Array) -> Array:
    """Return the x (r,) with the least |d - b diag(x) a|_F: b (m, r), a (r, n); fp32.

    The normal equations are (b^T b o a a^T) x = diag(b^T d a^T). Where they are singular, the x of least norm.
    """
    b, a = up(b, "float64"), up(a, "float64")
    xp = namespace(b)
    right = xp.sum(b * (up(d, "float64") @ a.T), axis=0)
    return up(xp.linalg.pinv((b.T @ b) * (a @ a.T)) @ right, "float32")


def _drawn(seed: int, name: str, rows: int, columns: int) -> Array:
    """Return a matrix uniform in +-sqrt(6 / columns), as Kaiming's rule draws it."""
    return up((2.0 * uniform(key_of(seed, name), rows, columns) - 1.0) * sqrt(6.0 / columns), "float32")
