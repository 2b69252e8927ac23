"""quantize: an adapter in few bits per weight, with the least error that the bytes allow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import inf
from typing import Any, NamedTuple

from loratools.core.adapter import Adapter
from loratools.core.pool import keep_freed_memory
from loratools.core.update import Array, namespace
from loratools.errors import NumericsError, UsageError
from loratools.files import BaseLike, open_base
from loratools.io.stats import StatsLike
from loratools.kinds.binary import Binary, binary
from loratools.kinds.lowrank import LowRank, low_rank
from loratools.kinds.packed import Packed, empty, packed
from loratools.linalg import factored
from loratools.linalg.lowbit import LowBit, encode
from loratools.linalg.namespace import all_finite
from loratools.ops.canonical import Part, as_stored, canonical_parts, each
from loratools.ops.channels import channel_weights
from loratools.ops.quantise_budget import Budget
from loratools.ops.quantise_plan import Plan, group_sizes, plans, put
from loratools.ops.quantise_report import Figures, neighbours, quantise_report
from loratools.ops.weighing import Weighing, weighing

QUICK = 3  # sweeps for choosing among plans


def quantize(
    adapter: Adapter,
    *,
    bits: int | None = None,
    avg_bits: float | None = None,
    size: int | str | None = None,
    group: int = 0,
    scheme: str = "lowbit",
    stats: StatsLike | None = None,
    base: BaseLike | None = None,
) -> Adapter:
    """Return the adapter with every low-rank update packed in few bits (kind ``packed``); save it as ``native``.

    Exactly one budget, see :class:`Budget`; ``size`` is honoured to the byte by ``save(..., format="native")``. The
    updates are brought into the canonical gauge (balanced singular components); with ``avg_bits`` or ``size`` the bits
    of every component are chosen by marginal gain over all modules, otherwise all have ``bits``; then see
    :func:`loratools.linalg.lowbit.encode`. ``stats`` weigh the inputs of the modules (``"norm"``: by the norms
    of ``base``); both errors are told. ``scheme`` ``binary-adapter`` is
    the rule of arXiv:2307.16867, applied after the fact (kind ``binary``).

    What is no low-rank product (biases, heads, full differences, stacks of experts) is carried. Raises UsageError for
    an impossible budget, NumericsError naming the parameter for values that are not finite.
    """
    budget = Budget(bits, avg_bits, size, group, scheme)
    keep_freed_memory()
    directions = {name: low for name, u in adapter.items() if (low := low_rank(u)) is not None}
    if not directions:
        raise UsageError("the adapter holds no low-rank update to quantise", got=f"{len(adapter)} others")
    done = replace(adapter, report=None).with_history(f"quantize {budget.words}")
    done = replace(done, meta=replace(done.meta, absorbed={}))
    if budget.scheme == "binary-adapter":
        return _by_medians(adapter, done, directions, budget)
    weigh = None if stats is None else weighing(stats, adapter, open_base(base))
    weights = channel_weights(weigh, directions)
    parts = canonical_parts(directions)
    gauges, sizes = [parts], group_sizes(directions, budget)
    if len(sizes) > 1:
        gauges.append(as_stored(directions, parts))
    tries = [(p, g, plan) for p in gauges for g in sizes for plan in plans(done, directions, p, budget, g)]
    if len(tries) > 1:
        tries = [min(tries, key=lambda one: _wrong(_encoded(one[0], one[2], weights, one[1], sweeps=QUICK)))]
    ((gauge, group, plan),) = tries
    best = _encoded(gauge, plan, weights, group)
    updates = {name: put(u, best[name].update) if name in best else u for name, u in adapter.items()}
    made = replace(done, updates=updates)
    figures = {name: _figures(name, directions[name], parts[name], found, weigh) for name, found in best.items()}
    near = neighbours({n: (p.b, p.a) for n, p in parts.items()}, best_bytes(best), group)
    said = () if weigh is None else weigh.said
    return replace(made, report=quantise_report(figures, budget.words, adapter, made, near, said))


class Encoded(NamedTuple):
    """A packed update and |D' - D|^2 (in the weighted norm, if there is one)."""

    update: Packed
    wrong: float


def _encoded(
    parts: Mapping[str, Part], plan: Plan, weights: Mapping[str, Array], group: int, sweeps: int | None = None
) -> dict[str, Encoded]:
    """Encode every module by a plan; with ``sweeps`` roughly, for choosing among plans."""
    rough: dict[str, Any] = {} if sweeps is None else {"sweeps": sweeps, "rotate": False}

    def one(name: str) -> Encoded:
        p, bits = parts[name], plan[name]
        if not bits:
            return Encoded(empty(p.b, p.shape), p.square)
        k = len(bits)
        found: LowBit = encode(p.b[:, :k], p.a[:k, :], bits, group=group, weights=weights.get(name), **rough)
        if k < len(p.energies) and abs(p.square - sum(p.energies)) > 1e-3 * p.square:
            return Encoded(empty(p.b, p.shape), inf)  # components that are not orthogonal cannot be dropped
        kept = p.square if k == len(p.energies) else sum(p.energies[:k])
        return Encoded(packed(found, p.shape), found.error * kept + p.square - kept)

    return each(one, parts)


def _wrong(found: Mapping[str, Encoded]) -> float:
    """Return the whole squared error of an encoding."""
    return sum(one.wrong for one in found.values())


def best_bytes(found: Mapping[str, Encoded]) -> dict[str, int]:
    """Return the bytes of codes and scales, by parameter."""
    return {name: int(e.update.codes.nbytes + e.update.scales.nbytes) for name, e in found.items()}


def _figures(name: str, before: LowRank, part: Part, found: Encoded, weigh: Weighing | None) -> Figures:
    square, wrong, weights = part.square, found.wrong, before.rank * sum(before.matrix_shape)
    if weigh is None or name not in weigh or not part.energies:
        return Figures(square, wrong, before.rank, found.update.runs, weights)
    measured = weigh.squares(name, [LowRank(part.b, part.a)], [found.update.unpacked()])
    return Figures(*measured[:2], before.rank, found.update.runs, weights, measured[2:])


def _by_medians(adapter: Adapter, done: Adapter, directions: Mapping[str, LowRank], budget: Budget) -> Adapter:
    """Apply the paper's rule to the factors as they are."""
    assert budget.bits is not None
    bits = budget.bits

    def one(name: str) -> tuple[Binary, Figures]:
        u = directions[name]
        if not all(map(all_finite, u.factors())):
            raise NumericsError(
                "a factor is not finite", parameter=name, hint="the adapter diverged in training, or is damaged"
            )
        found = binary(u, bits)
        square, wrong = difference_squares(u, found.unpacked())
        weights = u.rank * sum(u.matrix_shape)
        return found, Figures(square, wrong, u.rank, (bits, u.rank), weights)

    found = each(one, directions)
    updates = {name: put(u, found[name][0]) if name in found else u for name, u in adapter.items()}
    made = replace(done, updates=updates)
    return replace(made, report=quantise_report({n: f for n, (_, f) in found.items()}, budget.words, adapter, made, ()))


def difference_squares(u: LowRank, v: LowRank) -> tuple[float, float]:
    """Return |D_u|^2 and |D_v - D_u|^2, from fp64 Gram matrices of both products side by side."""
    (b, a), (b2, a2) = u.factors("float64"), v.factors("float64")
    xp = namespace(b)
    square = factored.frobenius(b, a, scale=u.scale) ** 2
    tall = xp.concat([u.scale * b, -v.scale * b2], axis=1)
    return square, factored.frobenius(tall, xp.concat([a, a2], axis=0)) ** 2
