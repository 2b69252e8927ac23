"""One update on its way into a format: kept, routed through the graph of kinds, or formed on its base."""

from __future__ import annotations

from dataclasses import dataclass, replace

from loratools.core import generic
from loratools.core.adapter import Adapter
from loratools.core.update import Delta, Update
from loratools.errors import ConversionError, NeedsBaseError
from loratools.formats.base import Format
from loratools.io.base import Base
from loratools.kinds.dense import Dense
from loratools.kinds.dora import Dora
from loratools.kinds.lowrank import low_rank
from loratools.kinds.rebased import Rebased
from loratools.kinds.replace import Replace
from loratools.kinds.replace_rows import ReplaceRows
from loratools.kinds.sparse import Sparse
from loratools.leaf import Leaf
from loratools.linalg.namespace import up

Step = tuple[Update | None, list[str], float]  # the new update, its route, the relative error


@dataclass(frozen=True)
class Target:
    """What one parameter may become: the kinds that the format holds there."""

    format: Format
    adapter: Adapter
    name: str
    own: bool

    def holds(self, u: Update) -> bool:
        """True if the format can say the update here; a source's own format can say all that it said."""
        said = self.own and isinstance(u, self.format.accepts) and not isinstance(u, Sparse)
        return said or self.says(u)

    def says(self, u: Update) -> bool:
        """True if the format has a place for this update here, whatever the source said."""
        there = replace(self.adapter, updates={self.name: u, **_mates(self.adapter, self.name)})
        return self.format.holds(there, self.name)

    def kinds_but(self, u: Update) -> tuple[type[Update], ...]:
        """Return the kinds that the format accepts here, without that of an update it does not hold."""
        whole = self.says(Dense(Leaf(u.shape, "float32", lambda out: out)))
        kinds = (kind for kind in self.format.accepts if whole or not issubclass(kind, Dense))
        return tuple(kind for kind in kinds if not isinstance(u, kind))


def _mates(adapter: Adapter, name: str) -> dict[str, Update]:
    """Return the other parameters of the same module: a bias is held beside its factors only."""
    module = name.rpartition(".")[0]
    mates = (f"{module}.{leaf}" for leaf in ("weight", "bias"))
    return {mate: adapter[mate] for mate in mates if mate != name and mate in adapter}


def converted(u: Update, to: Target, base: Base | None, lossy: bool) -> Step:
    """Return the update in a kind that the target holds; None under ``lossy`` where there is no way at all."""
    try:
        if not to.holds(u):
            return _unheld(u, to, base, lossy)
        if isinstance(u, Dora) and not isinstance(u.direction, to.format.accepts):
            direction, route, error = _routed(u.direction, to.format.accepts, lossy)
            assert isinstance(direction, Delta)
            return replace(u, direction=direction), [f"{u.kind}({kind})" for kind in route], error
        return u, [u.kind], 0.0
    except (ConversionError, NeedsBaseError):
        if not lossy:
            raise
        return None, [u.kind], 1.0


def _unheld(u: Update, to: Target, base: Base | None, lossy: bool) -> Step:
    """Return what the target holds instead of ``u``: a coat becomes the difference that it makes on the base."""
    if isinstance(u, Delta):
        factors = low_rank(u)
        if factors is not None and to.says(factors):
            return factors, [u.kind, factors.kind], 0.0
        return _routed(u, to.kinds_but(u), lossy)
    if isinstance(u, Replace | ReplaceRows | Rebased):
        raise ConversionError(f"the format has no place for a {u.kind} update", hint="--lossy leaves it out")
    if base is None:
        raise NeedsBaseError(
            f"the format has no place for this {u.kind} update, only for the difference that it makes on the base",
            hint="--base BASE (with --lossy, where factors are wanted)",
        )
    delta = u.delta(base[base.resolve([to.name])[to.name]])
    factors = low_rank(delta)
    if factors is not None and to.says(factors):  # of bounded rank: nothing is lost
        return factors, [u.kind, factors.kind], 0.0
    difference = Dense(delta.dense())
    if to.says(difference):
        return difference, [u.kind, difference.kind], 0.0
    new, route, error = _routed(difference, to.kinds_but(difference), lossy)
    return new, [u.kind, *route], error


def _routed(u: Delta, accepts: tuple[type[Update], ...], lossy: bool) -> Step:
    """Return the update by the cheapest route to an accepted kind, and the error that it makes."""
    from loratools.core.routes import shortest

    if isinstance(u, accepts):
        return u, [u.kind], 0.0
    new = generic.convert(u, accepts, lossy=lossy)
    path = shortest(type(u), accepts, lossy=lossy) or []
    exact = all(step.exact for step in path)
    return new, [u.kind, *(step.target.kind for step in path)], 0.0 if exact else _error(u, new)


def _error(old: Delta, new: Update) -> float:
    """Return ||old - new|| / ||old||, formed: inexact routes start from formed updates."""
    total = generic.norm(old)
    lost = up(old.dense(), "float64") - up(generic.need_delta(new).dense(), "float64")
    return float((lost * lost).sum()) ** 0.5 / total if total else 0.0
