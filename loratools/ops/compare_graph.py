"""The similarity graph of adapters and its communities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LEAST = 0.1
"""Cosine from which two adapters are joined: unrelated updates of a real model's size lie within 0.02 of zero."""

Similarity = Mapping[tuple[str, str], float]


def edges(similarity: Similarity) -> list[dict[str, Any]]:
    """Return the edges of the graph: pairs whose cosine is at least ``LEAST``."""
    return [{"a": a, "b": b, "weight": value} for (a, b), value in similarity.items() if value >= LEAST]


def graph(names: Sequence[str], similarity: Similarity) -> Any:
    """Return the :class:`networkx.Graph` over adapters, edge attribute ``weight`` = cosine."""
    import networkx as nx

    g = nx.Graph()
    g.add_nodes_from(names)
    g.add_weighted_edges_from((edge["a"], edge["b"], edge["weight"]) for edge in edges(similarity))
    return g


def communities(names: Sequence[str], similarity: Similarity, seed: int) -> list[list[str]]:
    """Return groups of similar adapters (Louvain, arXiv:0803.0476), the largest first, members in the given order."""
    from networkx.algorithms.community import louvain_communities

    found = louvain_communities(graph(names, similarity), weight="weight", seed=seed)
    ordered = [sorted(members, key=list(names).index) for members in found]
    return sorted(ordered, key=lambda members: (-len(members), names.index(members[0])))
