"""Rounding to a storage dtype: to nearest even, or at random with the exact value as its mean."""

from __future__ import annotations

from loratools.errors import UsageError
from loratools.leaf import ITEMSIZE, Array
from loratools.linalg.namespace import cast, dtype_name, namespace, up
from loratools.linalg.seeds import Key, uniform

MODES = ("nearest", "stochastic")
_BITS = {1: "int8", 2: "int16", 4: "int32"}  # integers as wide as the float: adding 1 moves away from zero


def rounded(x: Array, dtype: str, *, mode: str = "nearest", key: Key = (0, 0), row: int = 0) -> Array:
    """Return ``x`` (m, ...) in the storage dtype; what does not fit becomes inf or NaN, for the caller to find.

    ``stochastic``: up or down with the odds that make the mean exact, by the uniform numbers of ``key`` at rows
    ``row`` .. ``row + m``, so that blocks of one tensor give what the whole would. Values that fit stay as they are.
    Raises UsageError for an unknown mode. Source: Croci et al., "Stochastic rounding", Royal Society Open Science 2022.
    """
    if mode not in MODES:
        raise UsageError("unknown rounding", expected=" or ".join(MODES), got=mode)
    narrow = cast(x, "float32") if dtype_name(x) == "float64" and dtype != "float64" else x
    if mode == "nearest" or ITEMSIZE[dtype] >= ITEMSIZE[dtype_name(x)]:
        return cast(narrow, dtype)
    return _stochastic(narrow, dtype, key, row)


def _stochastic(x: Array, dtype: str, key: Key, row: int) -> Array:
    xp = namespace(x)
    near = cast(x, dtype)
    bits = near.view(getattr(xp, _BITS[ITEMSIZE[dtype]]))
    low = xp.where(xp.abs(up(near)) > xp.abs(x), bits - 1, bits)
    bottom, top = xp.abs(up(low.view(near.dtype))), xp.abs(up((low + 1).view(near.dtype)))
    rows = x.reshape(x.shape[0], -1) if x.ndim else x.reshape(1, 1)
    dice = uniform(key, range(row, row + rows.shape[0]), rows.shape[1], like=rows).reshape(x.shape)
    climbs = xp.isfinite(top) & (dice * up(top - bottom, "float64") < up(xp.abs(x) - bottom, "float64"))
    return xp.where(climbs, low + 1, low).view(near.dtype)
