"""Updates as components in a balanced gauge: what is brought into few bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from loratools.core.pool import parallel_map
from loratools.core.update import Array, namespace
from loratools.errors import LoratoolsError
from loratools.kinds.lowrank import LowRank
from loratools.linalg import factored
from loratools.linalg.namespace import up
from loratools.linalg.select import numerical_rank

Y = TypeVar("Y")


class Part(NamedTuple):
    """An update as components b (m, k), a (k, n), balanced, the strongest first, with their energies; and its shape.

    In the canonical gauge the energies are squared singular values and sum to |D|^2 = ``square``.
    """

    b: Array
    a: Array
    energies: tuple[float, ...]
    shape: tuple[int, ...]
    square: float


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

    return each(one, directions)


def as_stored(directions: Mapping[str, LowRank], parts: Mapping[str, Part]) -> dict[str, Part]:
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


def each(one: Callable[[str], Y], directions: Mapping[str, Any]) -> dict[str, Y]:
    """Return ``one`` of every name, in parallel; ``directions`` tell the work by their factors ``b`` and ``a``."""
    names = list(directions)
    return dict(zip(names, parallel_map(one, names, weights=[_weight(directions[n]) for n in names]), strict=True))


def _weight(u: Any) -> int:
    """Return the work of one module in bytes: each weight is looked at many times."""
    return 64 * int(sum(t.nbytes for t in (u.b, u.a)))
