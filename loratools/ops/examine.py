"""One matrix of an adapter, in every checkpoint: the figures of its row in a diagnosis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from loratools.core import generic
from loratools.core.coat import Coat
from loratools.core.update import Array, Delta, Update, tensors
from loratools.errors import LoratoolsError
from loratools.io.base import Base
from loratools.kinds.lowrank import low_rank
from loratools.leaf import Leaf
from loratools.linalg import channels as tell
from loratools.linalg.namespace import all_finite, namespace, up
from loratools.ops.against_base import Asked, intruder_figures, matrix_of, no_intruders, size_figures
from loratools.ops.base_side import BaseSide, cached_base_side, content_of
from loratools.ops.parts import Part
from loratools.ops.placing import base_matrix
from loratools.ops.rank_curve import rank_curve
from loratools.ops.spectra import spectrum_figures


@dataclass(frozen=True)
class Plan:
    """What is asked of every part: ``names`` adapter name -> base name; ``rslora`` as the file says it, or None."""

    asked: Asked
    base: Base | None
    names: Mapping[str, str]
    cache: Path | None
    curve: bool
    rslora: bool | None


def examined(steps: Sequence[Part], plan: Plan) -> list[dict[str, Any]]:
    """Return one row of figures per checkpoint; errors name the part."""
    try:
        rows = [_own(part, plan) for part in steps]
        if plan.base is not None and steps[-1].parameter in plan.names:
            rows = [{**own, **more} for own, more in zip(rows, _against(steps, plan), strict=True)]
        moves = [None, *(_moved(a.update, b.update) for a, b in pairwise(steps))]
        return [row if len(steps) == 1 else {**row, "moved": m} for row, m in zip(rows, moves, strict=True)]
    except LoratoolsError as error:
        raise error.at(parameter=steps[-1].name) from error


def _own(part: Part, plan: Plan) -> dict[str, Any]:
    """Return the figures that need no base. A coat's spectrum is that of its low-rank direction."""
    update = part.update
    row: dict[str, Any] = {"name": part.name, "kind": update.kind, "shape": list(update.shape)}
    row["matrix"] = len(update.shape) > 1
    direction = low_rank(update)
    if direction is not None:
        b, a = direction.factors()
        found = tell.channels(b, a, direction.scale)
        bad = 0 if all_finite(found.gb) and all_finite(found.ga) else _nonfinite(update)
        row |= {"rank": direction.rank, **_scale_figures(direction.scale, direction.rank, found, plan.rslora)}
        row |= {"nonfinite": bad or _nonfinite(update, beyond=("b", "a"))}
        return row if bad else {**row, **_spectral(found), **(rank_curve(found) if plan.curve else {})}
    bad = _nonfinite(update)
    plain = isinstance(update, Delta) and row["matrix"] and not bad
    return {**row, "nonfinite": bad, **(spectrum_figures(_floats(generic.svdvals(update))) if plain else {})}


def _scale_figures(scale: float, rank: int, found: tell.Channels, rslora: bool | None) -> dict[str, Any]:
    xp = namespace(found.gb)
    sizes = [float(xp.sum(xp.linalg.diagonal(g))) for g in (found.gb, found.ga)]
    return {
        "scale": scale,
        "scale_times_rank": scale * rank,
        "scale_times_root_rank": scale * rank**0.5,
        "scaling": None if rslora is None else "rslora" if rslora else "lora",
        "factor_size": abs(scale) * (sizes[0] * sizes[1]) ** 0.5,
    }


def _spectral(found: tell.Channels) -> dict[str, Any]:
    return {
        **spectrum_figures(_floats(found.s)),
        "balance": tell.balance(found),
        "condition_b": tell.condition(found.gb),
        "condition_a": tell.condition(found.ga),
        "dead_components": tell.dead(found),
        "duplicate_components": tell.duplicates(found),
    }


def _against(steps: Sequence[Part], plan: Plan) -> list[dict[str, Any]]:
    """Return the figures against the base of one part in every checkpoint; the base is read once."""
    assert plan.base is not None
    last = steps[-1]
    found = base_matrix(last, plan.base.leaf(plan.names[last.parameter]))
    if found is None:
        return [{} for _ in steps]
    stored, w, matrix = found
    content = "" if plan.cache is None else content_of(stored) + ("-turned" if last.turned else "")
    k = min(plan.asked.k, *matrix.shape)
    side = cached_base_side(matrix, k, plan.asked.key, plan.cache, content)
    return [_figures(part, w, matrix, side, plan.asked) for part in steps]


def _figures(part: Part, w: Array, matrix: Array, side: BaseSide, asked: Asked) -> dict[str, Any]:
    if _nonfinite(part.update):
        return {}
    delta = part.update.delta(w)
    op = matrix_of(delta, turned=part.turned)
    sizes = size_figures(delta, op, side, asked.key)
    sizes |= _spectrum(part.update, delta, sizes)
    if sizes["update_norm"] == 0:
        return {**sizes, **no_intruders(asked.k, *matrix.shape)}
    return {**sizes, **intruder_figures(matrix, op, asked)}


def _spectrum(update: Update, delta: Delta, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the spectrum of what a coat adds to its base: all of it where its rank is bounded, else what norms tell.

    That of a DoRA is its direction's, which needs no base.
    """
    if not isinstance(update, Coat):
        return {}
    flat = low_rank(delta)
    if flat is not None:
        return spectrum_figures(_floats(generic.svdvals(flat)))
    whole, first = sizes["update_norm"], (sizes["relative_spectral_norm"] or 0.0) * sizes["base_spectral_norm"]
    return {"spectral_norm": first, "frobenius_norm": whole, "stable_rank": (whole / first) ** 2 if first else 0.0}


def _moved(before: Update, after: Update) -> float | None:
    """Return |D' - D| / |D'| between two checkpoints; None for what is no difference, or zero."""
    if not (isinstance(before, Delta) and isinstance(after, Delta)) or _nonfinite(before) or _nonfinite(after):
        return None
    old, new, both = generic.inner(before, before), generic.inner(after, after), generic.inner(before, after)
    return (max(old + new - 2 * both, 0.0) / new) ** 0.5 if new > 0 else None


def _nonfinite(update: Update, beyond: tuple[str, ...] = ()) -> int:
    """Return how many values of an update are not finite; tensors whose last name is in ``beyond`` are known to be."""
    found = 0
    for name, t in tensors(update):
        if name.rpartition(".")[2] in beyond:
            continue
        x = up(t) if isinstance(t, Leaf) else t
        if not all_finite(x):
            xp = namespace(x)
            found += int(xp.sum(~xp.isfinite(up(x))))
    return found


def _floats(x: Array) -> list[float]:
    return [float(value) for value in x]
