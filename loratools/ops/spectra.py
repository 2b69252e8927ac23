"""Figures of one spectrum: size, how many directions it really has, and which rank would do."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, exp, log, sqrt
from typing import Any

LISTED = 256
"""Singular values listed at most; every figure is computed from all of them."""

NUMERICAL = 1e-7
"""Singular values below this share of the largest do not count."""

ENERGIES = (0.9, 0.95, 0.99)


def spectrum_figures(s: Sequence[float]) -> dict[str, Any]:
    """Return the figures of singular values ``s``, descending: all of them zero for a zero update.

    ``effective_rank``: exp of the entropy of s / sum s (Roy, Vetterli 2007); ``effective_rank_energy``: of the shares
    of s^2; ``stable_rank``: |D|_F^2 / |D|_2^2.
    """
    squares = [x * x for x in s]
    total = sum(squares)
    return {
        "spectral_norm": s[0] if s else 0.0,
        "frobenius_norm": sqrt(total),
        "stable_rank": total / squares[0] if total else 0.0,
        "effective_rank": _perplexity(s),
        "effective_rank_energy": _perplexity(squares),
        "numerical_rank": numerical_rank(s),
        "suggested_ranks": suggested_ranks(s),
        "singular_values": list(s[:LISTED]),
        "energy": energy_curve(s)[:LISTED],
    }


def numerical_rank(s: Sequence[float]) -> int:
    """Return how many values exceed 1e-7 of the largest; 0 for a zero update."""
    return sum(x > NUMERICAL * s[0] for x in s) if s else 0


def energy_curve(s: Sequence[float]) -> list[float]:
    """Return the share of the squared Frobenius norm in the first k values, k = 1, 2, ...; zeros for a zero update."""
    total, kept, curve = sum(x * x for x in s), 0.0, []
    for x in s:
        kept += x * x
        curve.append(kept / total if total else 0.0)
    return curve


def suggested_ranks(s: Sequence[float]) -> dict[str, int]:
    """Return the rank that each rule would choose.

    ``energy_0.9`` and so on: the smallest that keeps the share; ``stable``, ``effective`` (of the energy): rounded up;
    ``gap``: before the largest drop from one value to the next.
    """
    live = list(s[: numerical_rank(s)])
    if not live:
        return dict.fromkeys([*(f"energy_{e:g}" for e in ENERGIES), "stable", "effective", "gap"], 0)
    curve, squares = energy_curve(live), [x * x for x in live]
    drops = [live[i] / live[i + 1] for i in range(len(live) - 1)]
    return {
        **{f"energy_{e:g}": 1 + sum(share < e for share in curve) for e in ENERGIES},
        "stable": _up(sum(squares) / squares[0]),
        "effective": _up(_perplexity(squares)),
        "gap": 1 + drops.index(max(drops)) if drops else 1,
    }


def _up(x: float) -> int:
    return ceil(x - 1e-9)  # rounding alone must not cost a rank


def _perplexity(weights: Sequence[float]) -> float:
    """Return exp of the entropy of the weights' shares: how many equal ones would be as spread out; 0 for none."""
    total = sum(weights)
    shares = [w / total for w in weights if w > 0] if total else []
    return exp(-sum(p * log(p) for p in shares)) if shares else 0.0
