"""The graph of kinds: which kind can be written as which, exactly or with loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

from loratools.core.update import KINDS, Update

U = TypeVar("U", bound=Update)
LOSS = 1000.0  # any exact detour is cheaper than one lossy step


class Route(NamedTuple):
    """One edge: ``run`` turns a ``source`` into a ``target``; ``cost`` orders exact routes by growth in bytes."""

    source: type[Update]
    target: type[Update]
    run: Callable[[Any], Update]
    cost: float
    exact: bool


_routes: list[Route] = []


def route(
    source: type[Update], target: type[Update], *, cost: float = 1.0, exact: bool = True
) -> Callable[[Callable[[U], Update]], Callable[[U], Update]]:
    """Decorator: register a function of one update as an edge of the graph."""

    def register(run: Callable[[U], Update]) -> Callable[[U], Update]:
        _routes.append(Route(source, target, run, cost, exact))
        return run

    return register


def graph() -> Any:
    """Return all routes as a :class:`networkx.DiGraph` over kinds (edge attributes ``route`` and ``weight``)."""
    import networkx as nx

    KINDS.discover()
    g = nx.DiGraph()
    g.add_nodes_from(KINDS.values())
    for r in _routes:
        g.add_edge(r.source, r.target, route=r, weight=r.cost + (0.0 if r.exact else LOSS))
    return g


def shortest(source: type[Update], accepts: Sequence[type[Update]], *, lossy: bool = False) -> list[Route] | None:
    """Return the cheapest path from ``source`` to any accepted kind, exact edges only unless ``lossy``; None if none.

    Dijkstra over a graph of about a dozen nodes.
    """
    import networkx as nx

    g = graph()
    allowed = nx.subgraph_view(g, filter_edge=lambda a, b: lossy or g.edges[a, b]["route"].exact)
    length, paths = nx.single_source_dijkstra(allowed, source)
    reachable = [k for k in accepts if k in paths]
    if not reachable:
        return None
    path = paths[min(reachable, key=length.__getitem__)]
    return [g.edges[a, b]["route"] for a, b in pairwise(path)]
