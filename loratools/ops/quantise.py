"""quantize: an adapter in few bits per weight, with the least error that the bytes allow; and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf, isfinite, prod
from typing import Any, NamedTuple

from loratools.core.adapter import Adapter
from loratools.core.pool import parallel_map
from loratools.core.update import Array, Leaf, Update, namespace, nbytes
from loratools.errors import LoratoolsError, UsageError
from loratools.files import BaseLike, open_base, written_size
from loratools.io.stats import StatsLike
from loratools.kinds.binary import Binary, binary
from loratools.kinds.coded import Coded
from loratools.kinds.lowrank import LowRank, low_rank, stored_as, with_low_rank
from loratools.kinds.packed import Packed, empty, packed, packed_sizes, payload_bytes, runs_of
from loratools.linalg import factored
from loratools.linalg.lowbit import LowBit, encode
from loratools.linalg.medians import MEDIANS
from loratools.linalg.namespace import up
from loratools.linalg.select import numerical_rank
from loratools.ops.bit_budget import Module, allocations
from loratools.ops.channels import channel_weights
from loratools.ops.quantise_report import Figures, neighbours, quantise_report
from loratools.ops.ranks import parse_size
from loratools.ops.weighing import Weighing, weighing
from loratools.report import Report

BITS = (1, 2, 3, 4, 8)
QUICK = 3  # sweeps for choosing among plans
GROUP, FINE = 128, 3.0  # scales per so many entries are tried as well above so many bits on average
SCHEMES = ("lowbit", "binary-adapter")
Plan = Mapping[str, tuple[int, ...]]  # bits of every kept component, by parameter


@dataclass(frozen=True)
class Budget:
    """How few bits: exactly one of ``bits`` for every component, ``avg_bits`` per stored weight (scales counted), and
    ``size``, the bytes of the whole file. ``group`` entries share a scale (0: a
    whole vector, and above 3 bits on average groups of 128 where these are better).

    Raises UsageError for contradictions and values out of range.
    """

    bits: int | None = None
    avg_bits: float | None = None
    size: int | str | None = None
    group: int = 0
    scheme: str = "lowbit"

    def __post_init__(self) -> None:
        given = [name for name in ("bits", "avg_bits", "size") if getattr(self, name) is not None]
        if len(given) != 1:
            got = ", ".join(given) or "none"
            raise UsageError("exactly one budget is needed", expected="bits, avg-bits or size", got=got)
        if self.scheme not in SCHEMES:
            raise UsageError("unknown scheme", expected=" or ".join(SCHEMES), got=self.scheme)
        if self.scheme == "binary-adapter" and (self.bits not in MEDIANS or self.group):
            sizes = ", ".join(map(str, MEDIANS))
            raise UsageError("Binary Adapters have one size for all and no groups", expected=f"bits {sizes}",
                             got=f"bits {self.bits}, group {self.group}")  # fmt: skip
        if self.scheme == "lowbit" and self.bits is not None and self.bits not in BITS:
            raise UsageError("bits out of range", expected=", ".join(map(str, BITS)), got=self.bits)
        if self.avg_bits is not None and not (isfinite(self.avg_bits) and 0 < self.avg_bits <= 16):
            raise UsageError("average bits out of range", expected="above 0 and at most 16", got=self.avg_bits)
        if self.group and self.group < 8:
            raise UsageError("group out of range", expected="0 (whole vectors) or at least 8", got=self.group)
        if self.size is not None:
            object.__setattr__(self, "size", parse_size(self.size))

    @property
    def words(self) -> str:
        """The budget, for the history."""
        said = (("bits", self.bits), ("avg-bits", self.avg_bits), ("size", self.size), ("group", self.group or None))
        scheme = "" if self.scheme == "lowbit" else f" {self.scheme}"
        return " ".join(f"{name} {value}" for name, value in said if value is not None) + scheme

    @property
    def suffix(self) -> str:
        """The budget, for a file name."""
        if self.bits is not None:
            return f"{self.bits}bit"
        return f"{self.avg_bits:g}bit" if self.avg_bits is not None else f"{self.size}B"


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
    gauges, sizes = [parts], _groups(directions, budget)
    if len(sizes) > 1:
        gauges.append(_as_stored(directions, parts))
    tries = [(p, g, plan) for p in gauges for g in sizes for plan in _plans(done, directions, p, budget, g)]
    if len(tries) > 1:
        tries = [min(tries, key=lambda one: _wrong(_encoded(one[0], one[2], weights, one[1], sweeps=QUICK)))]
    ((gauge, group, plan),) = tries
    best = _encoded(gauge, plan, weights, group)
    updates = {name: _put(u, best[name].update) if name in best else u for name, u in adapter.items()}
    made = replace(done, updates=updates)
    figures = {name: _figures(name, directions[name], parts[name], found, weigh) for name, found in best.items()}
    near = neighbours({n: (p.b, p.a) for n, p in parts.items()}, best_bytes(best), group)
    said = () if weigh is None else weigh.said
    return replace(made, report=quantise_report(figures, budget.words, adapter, made, near, said))


class Part(NamedTuple):
    """An update as components b (m, k), a (k, n), balanced, the strongest first, with their energies; and its shape.

    In the canonical gauge the energies are squared singular values and sum to |D|^2 = ``square``.
    """

    b: Array
    a: Array
    energies: tuple[float, ...]
    shape: tuple[int, ...]
    square: float


class Encoded(NamedTuple):
    """A packed update and |D' - D|^2 (in the weighted norm, if there is one)."""

    update: Packed
    wrong: float


def canonical_parts(directions: Mapping[str, LowRank]) -> dict[str, Part]:
    """Return every update in the canonical gauge. Raises NumericsError naming the parameter."""

    def one(name: str) -> Part:
        u = directions[name]
        try:
            found = factored.truncate(u.b, u.a, numerical_rank, scale=u.scale)
        except LoratoolsError as error:
            raise error.at(parameter=name) from error
        energies = tuple(float(s) ** 2 for s in found.singular_values[: found.rank])
        return Part(up(found.b), up(found.a), energies if energies[0] else (), u.shape, sum(energies))

    return _each(one, directions)


def _as_stored(directions: Mapping[str, LowRank], parts: Mapping[str, Part]) -> dict[str, Part]:
    """Return every update in its own gauge, columns and rows balanced.

    With many bits it may win: an A that was drawn uniformly and hardly trained fills evenly spaced levels.
    """
    found = {}
    for name, u in directions.items():
        b, a = u.factors("float32")
        xp = namespace(b)
        tall, wide = xp.sqrt(xp.sum(b * b, axis=0)), xp.sqrt(xp.sum(a * a, axis=1))
        size = abs(u.scale) * tall * wide
        order = [int(j) for j in xp.flip(xp.argsort(size)) if float(size[j]) > 0]
        if not order or not parts[name].energies:
            found[name] = parts[name]
            continue
        keep = xp.asarray(order)
        root = xp.sqrt(size[keep])
        b = b[:, keep] * ((1.0 if u.scale > 0 else -1.0) * root / tall[keep])
        a = a[keep, :] * (root / wide[keep])[:, None]
        found[name] = Part(b, a, tuple(float(s) ** 2 for s in size[keep]), u.shape, parts[name].square)
    return found


def _each(one: Any, directions: Mapping[str, Any]) -> dict[str, Any]:
    names = list(directions)
    return dict(zip(names, parallel_map(one, names, weights=[_weight(directions[n]) for n in names]), strict=True))


def _weight(u: Any) -> int:
    """Return the work of one module in bytes: each weight is looked at many times."""
    return 64 * int(sum(t.nbytes for t in (u.b, u.a)))


def _groups(directions: Mapping[str, LowRank], budget: Budget) -> tuple[int, ...]:
    """Return the sizes of groups worth trying: with many bits, outliers cost more than scales per 128 entries."""
    weights = sum(u.rank * sum(u.matrix_shape) for u in directions.values())
    average = budget.avg_bits or (8 * budget.size / weights if isinstance(budget.size, int) else 0.0)
    return (0, GROUP) if average > FINE and not budget.group else (budget.group,)


def _plans(
    done: Adapter, directions: Mapping[str, LowRank], parts: Mapping[str, Part], budget: Budget, group: int
) -> list[Plan]:
    """Return the bits of every component, by every way worth trying."""
    if budget.bits is not None:
        return [{name: (budget.bits,) * len(p.energies) for name, p in parts.items()}]
    modules = {name: Module(p.energies, p.shape) for name, p in parts.items()}
    if budget.avg_bits is not None:
        weights = sum(u.rank * sum(u.matrix_shape) for u in directions.values())
        return list(allocations(modules, int(budget.avg_bits * weights / 8), group=group))
    assert isinstance(budget.size, int)
    return [fitted(done, modules, plan, budget.size, group) for plan in _within(done, modules, budget, group)]


def _within(done: Adapter, modules: Mapping[str, Module], budget: Budget, group: int) -> list[Plan]:
    assert isinstance(budget.size, int)
    least = planned_size(done, dict.fromkeys(modules, ()), modules, group)
    if least > budget.size:
        raise UsageError(
            "the file cannot be so small: this is the size without a single code",
            expected=f"at least {least} bytes",
            got=budget.size,
        )
    found: list[Plan] = list(allocations(modules, budget.size - least, group=group))
    return found or [dict.fromkeys(modules, ())]


def fitted(done: Adapter, modules: Mapping[str, Module], plan: Plan, size: int, group: int) -> Plan:
    """Return the plan with its weakest components dropped until the whole file has at most ``size`` bytes.

    What a plan costs in the header is known only when it is made: some hundred bytes per module at most.
    """
    now = {name: list(bits) for name, bits in plan.items()}
    last = sorted(((modules[n].energies[j], n) for n, bits in now.items() for j in range(len(bits))), reverse=True)
    over = planned_size(done, _frozen(now), modules, group) - size
    while over > 0:
        freed = 0
        while freed < over and last:
            _, name = last.pop()
            freed += payload_bytes((now[name].pop(), 1), modules[name].shape, group)
        over = planned_size(done, _frozen(now), modules, group) - size
    return _frozen(now)


def _frozen(bits: Mapping[str, list[int]]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(b) for name, b in bits.items()}


def planned_size(done: Adapter, plan: Plan, modules: Mapping[str, Module], group: int) -> int:
    """Return the bytes of the file that a plan becomes, from shapes alone."""
    updates = {
        name: _put(u, _promised(plan[name], modules[name].shape, group)) if name in plan else u
        for name, u in done.items()
    }
    return written_size(replace(done, updates=updates), format="native")


def _promised(bits: tuple[int, ...], shape: tuple[int, ...], group: int) -> Packed:
    runs = runs_of(bits)
    codes, scales = packed_sizes(runs, shape[0], prod(shape[1:]), group)

    def never(out: Array | None) -> Array:
        raise AssertionError("a plan has no values")

    book = 1 if any(4 < b < 16 for b in bits) else 0  # the longer word, if there is one
    return Packed(Leaf((codes,), "uint8", never), Leaf((scales,), "float16", never), runs, shape, group, book)


def _put(u: Update, new: Packed | Binary) -> Update:
    """Return ``u`` with its direction replaced by the packed one."""
    return with_low_rank(u, new)  # type: ignore[arg-type]  # any Delta stands where a low-rank one stood


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

    return _each(one, parts)


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
        found = binary(u, bits)
        square, wrong = difference_squares(u, found.unpacked())
        weights = u.rank * sum(u.matrix_shape)
        return found, Figures(square, wrong, u.rank, (bits, u.rank), weights)

    found = _each(one, directions)
    updates = {name: _put(u, found[name][0]) if name in found else u for name, u in adapter.items()}
    made = replace(done, updates=updates)
    return replace(made, report=quantise_report({n: f for n, (_, f) in found.items()}, budget.words, adapter, made, ()))


def difference_squares(u: LowRank, v: LowRank) -> tuple[float, float]:
    """Return |D_u|^2 and |D_v - D_u|^2, from fp64 Gram matrices of both products side by side."""
    (b, a), (b2, a2) = u.factors("float64"), v.factors("float64")
    xp = namespace(b)
    square = factored.frobenius(b, a, scale=u.scale) ** 2
    tall = xp.concat([u.scale * b, -v.scale * b2], axis=1)
    return square, factored.frobenius(tall, xp.concat([a, a2], axis=0)) ** 2


def dequantize(adapter: Adapter, *, dtype: str = "float16") -> Adapter:
    """Return the adapter with every packed update unpacked into plain factors of ``dtype``, ready for any program."""
    found = [name for name, u in adapter.items() if _is_packed(u)]
    if not found:
        raise UsageError("nothing in this adapter is quantised", file=adapter.meta.path)

    def one(name: str, u: Update) -> Update:
        return _plain(u, dtype) if _is_packed(u) else u

    done = adapter.map(one).with_history(f"dequantize to {dtype}")
    rows = [
        {"name": n, "kind": done[n].kind, "bytes_before": nbytes(adapter[n]), "bytes_after": nbytes(done[n])}
        for n in found
    ]
    total = {"modules": len(found), "bytes_before": adapter.nbytes, "bytes_after": done.nbytes}
    units = {"bytes_before": "bytes of the packed tensors", "bytes_after": "bytes of the written tensors"}
    return replace(done, report=Report("loratools.dequantize/1", tuple(rows), total, units))


def _plain(u: Update, dtype: str) -> Update:
    """Return a packed update, or a coat around one, with plain factors in memory."""
    inner = _inner(u)
    if inner is not None:
        low = low_rank(_plain(inner, dtype))
        assert low is not None  # what was packed has factors
        return with_low_rank(u, low)
    assert isinstance(u, Coded)
    low = u.unpacked(dtype)
    b, a = (t.read() if isinstance(t, Leaf) else t for t in (low.b, low.a))
    return LowRank(stored_as(b, dtype), stored_as(a, dtype), low.scale, low.shape)


def _inner(u: Update) -> Update | None:
    found = getattr(u, "direction", None) or getattr(u, "update", None)
    return found if isinstance(found, Update) else None


def _is_packed(u: Update) -> bool:
    inner = _inner(u)
    return isinstance(u, Coded) or (inner is not None and _is_packed(inner))
