"""Plans of a quantisation: the bits of every component, within a budget of bits or of bytes of the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

from loratools.core.adapter import Adapter
from loratools.core.update import Array, Leaf, Update
from loratools.errors import UsageError
from loratools.files import written_size
from loratools.kinds.coded import Coded
from loratools.kinds.lowrank import LowRank, with_low_rank
from loratools.kinds.packed import Packed, packed_sizes, payload_bytes, runs_of
from loratools.ops.bit_budget import Module, allocations
from loratools.ops.canonical import Part
from loratools.ops.quantise_budget import Budget

GROUP, FINE = 128, 3.0  # scales per so many entries are tried as well above so many bits on average
Plan = Mapping[str, tuple[int, ...]]  # bits of every kept component, by parameter


def group_sizes(directions: Mapping[str, LowRank], budget: Budget) -> tuple[int, ...]:
    """Return the sizes of groups worth trying: with many bits, outliers cost more than scales per 128 entries."""
    weights = sum(u.rank * sum(u.matrix_shape) for u in directions.values())
    average = budget.avg_bits or (8 * budget.size / weights if isinstance(budget.size, int) else 0.0)
    return (0, GROUP) if average > FINE and not budget.group else (budget.group,)


def plans(
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
        name: put(u, _promised(plan[name], modules[name].shape, group)) if name in plan else u
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


def put(u: Update, new: Coded) -> Update:
    """Return ``u`` with its direction replaced by the packed one."""
    return with_low_rank(u, new)  # type: ignore[arg-type]  # any Delta stands where a low-rank one stood
