"""What the formats share: sorting keys into modules, pairs of factors, alphas, magnitudes, and how to say them again.

A *role* is what a tensor does (``a``, ``b``, ``core``, ``alpha``, ``magnitude``, ...), whatever a format calls it. The
layout of a module remembers its keys, the alpha as stored and the number of axes, so that a writer of the same format
says again what the file said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from loratools.core.update import Array, Delta, Leaf, Update, shape_of
from loratools.errors import ConversionError, FormatError, UnsupportedError
from loratools.kinds.dora import Dora
from loratools.kinds.lowrank import LowRank
from loratools.kinds.tucker import Tucker
from loratools.linalg.namespace import cast, up

Tensor = Leaf | Array
Parts = dict[str, tuple[str, Leaf]]  # role -> (key, tensor)
Layout = Mapping[str, Any]
_LONGEST_LEAF = 3


def grouped(tensors: Mapping[str, Leaf], roles: Mapping[str, str]) -> tuple[dict[str, Parts], dict[str, Leaf]]:
    """Return stem -> parts for keys that end in a leaf of ``roles`` (leaf -> role), and the keys that end in none.

    The longest leaf wins. Raises :class:`FormatError` where two keys of a module have one role.
    """
    modules: dict[str, Parts] = {}
    rest: dict[str, Leaf] = {}
    for key, leaf in tensors.items():
        stem, ending = split(key, roles)
        if not stem:
            rest[key] = leaf
            continue
        parts = modules.setdefault(stem, {})
        role = roles[ending]
        if role in parts:
            raise FormatError("two keys name one tensor", parameter=stem, got=f"{parts[role][0]} and {key}")
        parts[role] = (key, leaf)
    return modules, rest


def split(key: str, leaves: Mapping[str, str]) -> tuple[str, str]:
    """Return (stem, leaf) of a key; both empty where no known leaf ends it."""
    segments = key.split(".")
    for count in range(min(_LONGEST_LEAF, len(segments) - 1), 0, -1):
        ending = ".".join(segments[-count:])
        if ending in leaves:
            return ".".join(segments[:-count]), ending
    return "", ""


def require(parts: Parts, stem: str, *roles: str) -> list[Leaf]:
    """Return the tensors of these roles; :class:`FormatError` names what is missing and what is empty."""
    missing = [role for role in roles if role not in parts]
    if missing:
        raise FormatError("half of a factor pair is missing", parameter=stem, expected=", ".join(missing),
                          got=", ".join(key for key, _ in parts.values()))  # fmt: skip
    for key, leaf in parts.values():
        if 0 in leaf.shape:
            raise FormatError("a tensor has no elements", parameter=stem, got=f"{key} of shape {leaf.shape}")
    return [parts[role][1] for role in roles]


def number(leaf: Leaf) -> float:
    """Return the value of a tensor of one element."""
    if math.prod(leaf.shape) != 1:
        raise FormatError("an alpha is not a single number", got=f"shape {leaf.shape}")
    value = float(up(leaf, "float64").reshape(-1)[0])
    if not math.isfinite(value):
        raise FormatError("an alpha is not finite", got=value)
    return value


def scale_of(parts: Parts, rank: int, *, zero: float = 0.0) -> float:
    """Return alpha / rank; 1 without an alpha. ``zero`` is what a stored 0 means to the format's own program."""
    if "alpha" not in parts:
        return 1.0
    alpha = number(parts["alpha"][1])
    return zero if alpha == 0 else alpha / rank


def pair(parts: Parts, stem: str, *, zero: float = 0.0) -> LowRank | Tucker:
    """Return the update of ``a`` (r, in[, kernel]) and ``b`` (out, r[, 1, 1]), with ``core`` (r, r, kernel) if any."""
    a, b = require(parts, stem, "a", "b")
    rank = a.shape[0]
    kernel = tuple(a.shape[2:])
    if len(a.shape) < 2 or len(b.shape) < 2 or (b.shape[1] != rank and "core" not in parts):
        raise FormatError("the factors do not multiply", parameter=stem, expected="down (r, in), up (out, r)",
                          got=f"{a.shape}, {b.shape}")  # fmt: skip
    if math.prod(b.shape[2:]) != 1:
        raise UnsupportedError("a kernel on the up factor", parameter=stem, got=b.shape)
    scale = scale_of(parts, rank, zero=zero)
    flat = b.reshape((b.shape[0], b.shape[1]))
    if "core" in parts:
        if math.prod(kernel) != 1:
            raise UnsupportedError("a core between factors with kernels", parameter=stem, got=a.shape)
        return Tucker(parts["core"][1], flat, a.reshape(a.shape[:2]), scale)
    return LowRank(flat, a.reshape((rank, math.prod(a.shape[1:]))), scale, (b.shape[0], a.shape[1], *kernel))


def with_magnitude(direction: Delta, magnitude: Leaf, stem: str) -> Dora:
    """Return the coat of a magnitude whose shape says its axis: (out, 1, ...) or (1, in, ...)."""
    shape, wide = magnitude.shape, direction.shape
    unfolded = len(wide) == 2 and len(shape) > 2  # LoHa and LoKr store a kernel flat, and its magnitude with all axes
    fits = len(shape) == len(wide) or (unfolded and shape[0] == wide[0])
    axes = [i for i, n in enumerate(shape[:2]) if fits and n == wide[i] and math.prod(shape) == n]
    if len(axes) != 1:
        raise UnsupportedError(
            "a magnitude whose axis its shape does not say",
            parameter=stem,
            expected=f"({direction.shape[0]}, 1, ...) or (1, {direction.shape[1]}, ...)",
            got=shape,
        )
    return Dora(direction, magnitude.reshape((shape[axes[0]],)), axis=axes[0])


def layout_of(parts: Parts, update: Update) -> dict[str, Any]:
    """Return what a module's file said, as JSON: keys by role, alpha as stored, axes of the factors."""
    scale, rank = scale_and_rank(update)
    said: dict[str, Any] = {"keys": {role: key for role, (key, _) in parts.items()}, "scale": scale, "rank": rank}
    if "alpha" in parts:
        leaf = parts["alpha"][1]
        said["alpha"] = {"value": number(leaf), "dtype": leaf.dtype, "shape": list(leaf.shape)}
    for role, field in (("a", "axes"), ("magnitude", "magnitude_axes")):
        if role in parts:
            said[field] = len(parts[role][1].shape)
    return said


def scale_and_rank(update: Update) -> tuple[float, int | None]:
    """Return the scale of an update (of a coat's direction), and its rank where alpha is divided by one."""
    inner = update.direction if isinstance(update, Dora) else update
    rank = inner.rank if isinstance(inner, LowRank) else shape_of(inner.a)[0] if isinstance(inner, Tucker) else None
    return float(getattr(inner, "scale", 1.0)), rank


def unchanged(update: Update, layout: Layout) -> bool:
    """True if the scale and rank at reading still hold, so that the alpha as stored may be said again."""
    scale, rank = scale_and_rank(update)
    return layout.get("scale") == scale and layout.get("rank") == rank


def alpha_number(rank: int, scale: float) -> int | float:
    """Return scale * rank, as an int where it is one: some readers insist."""
    alpha = scale * rank
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def alpha_tensor(update: Update, rank: int, layout: Layout) -> Array | None:
    """Return the alpha to write, 0-d: the stored one where it holds, none where none was and none is needed.

    fp32 where it holds the value exactly, else fp64.
    """
    scale, _ = scale_and_rank(update)
    if "alpha" in layout and unchanged(update, layout):
        stored = layout["alpha"]
        return cast(np.full(tuple(stored["shape"]), stored["value"], np.float64), stored["dtype"])
    if "keys" in layout and "alpha" not in layout and scale == 1.0:
        return None
    alpha = scale * rank
    return np.asarray(alpha, np.float32 if float(np.float32(alpha)) == alpha else np.float64)


def written_pair(u: LowRank, axes: int | None = None) -> dict[str, Tensor]:
    """Return roles ``a``, ``b`` in the shapes of a linear layer or a convolution (``axes`` as the file had them)."""
    axes = axes or len(u.shape)
    if axes == 2:
        return {"a": u.a, "b": u.b}
    ones = (1,) * (axes - len(u.shape))
    out, kernel = u.shape[0], (*u.shape[2:], *ones)
    return {"a": u.a.reshape((u.rank, u.shape[1], *kernel)), "b": u.b.reshape((out, u.rank, *(1,) * (axes - 2)))}


def low_rank_of(name: str, u: Update) -> tuple[LowRank, Tensor | None]:
    """Return the factors and the output-axis magnitude of an update; :class:`ConversionError` for anything else."""
    if isinstance(u, Dora):
        if u.axis != 0:
            raise ConversionError(
                "a magnitude over the input axis has no place in this format",
                parameter=name,
                hint="--base BASE --lossy writes the full difference as factors",
            )
        if u.eps:
            raise ConversionError("magnitudes of this format have no epsilon", parameter=name, got=u.eps)
        return low_rank_of(name, u.direction)[0], u.magnitude
    if not isinstance(u, LowRank):
        raise ConversionError(f"a {u.kind} update has no place in this format", parameter=name)
    return u, None
