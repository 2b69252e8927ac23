"""Bottlenecks, x + U act(D x + d) + u: parameters that belong together, and no update of any weight.

They are carried as what they are; what can be said of one without data is the spectrum of U D, the size of every
hidden unit, and which units do nothing.
"""

from __future__ import annotations

from typing import Any

from loratools.core.adapter import Adapter
from loratools.errors import ConversionError
from loratools.kinds.replace import Replace
from loratools.linalg import factored
from loratools.linalg.namespace import namespace, up
from loratools.report import Report

SCHEMA = "loratools.bottlenecks/1"
UNITS = {
    "rank": "hidden units",
    "numerical_rank": "singular values of U D above 1e-6 of the largest",
    "stable_rank": "squared Frobenius norm of U D over the squared spectral norm",
    "elbow": "units up to the point of the spectrum that lies furthest below its chord",
    "dead": "hidden units with a zero column in U or a zero row in D and d",
    "frobenius_norm": "of U D",
    "trained": "false where U is zero, as it is initialised",
}


def refuse_bottlenecks(adapter: Adapter) -> None:
    """Raise :class:`ConversionError` for an adapter with bottlenecks: no other format says what they do."""
    names = [name for name in adapter if "bottleneck" in adapter.meta.layout.get(name, {})]
    if names:
        raise ConversionError(
            "a bottleneck with an activation between its factors is no update of a weight",
            parameter=names[0],
            hint="the native format and its own keep it",
        )


def bottlenecks(adapter: Adapter) -> Report | None:
    """Return one row per bottleneck of an adapter, None where it has none; O((d r + r^2) r) each."""
    modules: dict[str, dict[str, Any]] = {}
    for name, update in adapter.items():
        said = adapter.meta.layout.get(name, {})
        if "bottleneck" in said and isinstance(update, Replace):
            role = said.get("role") or ".".join(name.split(".")[-2:])
            modules.setdefault(said["bottleneck"], {})[role] = update.value
    rows = tuple(_row(name, parts) for name, parts in modules.items() if {"down.weight", "up.weight"} <= parts.keys())
    if not rows:
        return None
    total = {"modules": len(rows), "trained": sum(bool(row["trained"]) for row in rows)}
    return Report(SCHEMA, rows, total, UNITS)


def _row(name: str, parts: dict[str, Any]) -> dict[str, Any]:
    down, up_ = up(parts["down.weight"], "float64"), up(parts["up.weight"], "float64")
    xp = namespace(down, up_)
    s = [float(x) for x in factored.singular_values(up_, down)]
    bias = up(parts["down.bias"], "float64") if "down.bias" in parts else xp.zeros(down.shape[0])
    idle = (xp.linalg.vector_norm(up_, axis=0) == 0) | ((xp.linalg.vector_norm(down, axis=1) == 0) & (bias == 0))
    square, top = sum(x * x for x in s), s[0]
    return {
        "name": name,
        "rank": int(down.shape[0]),
        "numerical_rank": sum(x > 1e-6 * top for x in s) if top else 0,
        "stable_rank": square / top**2 if top else 0.0,
        "elbow": _elbow(s),
        "dead": int(xp.sum(xp.astype(idle, xp.int64))),
        "frobenius_norm": square**0.5,
        "trained": bool(xp.any(up_ != 0)),
        "singular_values": s,
    }


def _elbow(s: list[float]) -> int:
    """Return the number of values up to the one furthest below the chord from the first to the last."""
    if len(s) < 3 or s[0] == 0:
        return len(s)
    gaps = [s[0] + (s[-1] - s[0]) * i / (len(s) - 1) - x for i, x in enumerate(s)]
    return max(range(len(s)), key=gaps.__getitem__)
