"""How much sparse adapters get into each other's way: the metrics of SHiRA (arXiv:2406.13175) and the overlap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from math import sqrt
from typing import Any

from loratools.core.adapter import Adapter
from loratools.core.generic import Operator
from loratools.core.pool import parallel_map
from loratools.core.update import Array, Update, namespace
from loratools.errors import MismatchError, UsageError
from loratools.kinds.sparse import Sparse, common
from loratools.linalg import seeds
from loratools.linalg.namespace import cast, device_of, scatter_add, up
from loratools.report import Report

STEPS = 30  # of power iteration on A1^T A2
UNITS = {
    "awom": "spectral norm of A1^T A2, of the two updates of one module",
    "awor": "share of zeros in A1^T A2: 1 is no interference at all",
    "overlap": "entries that both hold / entries of the smaller",
    "opposed": "share of the common entries whose signs differ",
}


def sparse_interference(adapters: Sequence[Adapter], *, seed: int = 0) -> Report:
    """Return AWOM, AWOR and overlap of every pair of sparse adapters, module by module.

    AWOM by power iteration through the sparse factors. AWOR from the supports: entry (j, k) of A1^T A2 is filled if
    some row has column j in A1 and column k in A2 (sums that cancel count as filled); memory n^2 bytes of a module.
    Raises UsageError for fewer than two, MismatchError for different shapes.
    """
    if len(adapters) < 2:
        raise UsageError("interference is between adapters", expected="at least two", got=len(adapters))
    rows: list[dict[str, Any]] = []
    for (i, one), (j, two) in combinations(enumerate(adapters), 2):
        for name in one:
            u, v = one[name], two.get(name)
            if isinstance(u, Sparse) and isinstance(v, Sparse):
                if u.shape != v.shape:
                    raise MismatchError("updates of different shapes", parameter=name, expected=u.shape, got=v.shape)
                rows.append({"name": name, "first": i, "second": j, **pair(u, v, seed=seed)})
    if not rows:
        raise MismatchError("the adapters share no module with sparse updates", got=f"{len(adapters)} adapters")
    total = {
        "pairs": len(rows),
        "awom": max(row["awom"] for row in rows),
        "awor": sum(row["awor"] for row in rows) / len(rows),
        "overlap": sum(row["overlap"] for row in rows) / len(rows),
        "opposed": sum(row["opposed"] for row in rows) / len(rows),
    }
    return Report("loratools.interference/1", tuple(rows), total, UNITS)


def with_sparse(report: Report, rows: Mapping[str, Sequence[Update | None]], names: Sequence[str], seed: int) -> Report:
    """Return a comparison with these figures in its rows and totals, where every update is sparse; else as it is.

    ``rows``: the updates of every parameter, one per adapter, whose ``names`` are those of the report's pairs.
    """
    if not report.modules or not all(isinstance(u, Sparse) for row in rows.values() for u in row if u is not None):
        return report
    found = {
        (names[i], names[j]): _together(rows, i, j, seed) for i, j in combinations(range(len(names)), 2)
    }  # fmt: skip
    pairs = tuple({**row, **found[row["a"], row["b"]]} for row in report.modules)
    known = [row for row in pairs if row["awom"] is not None]
    total = {key: sum(row[key] for row in known) / len(known) if known else None for key in UNITS}
    return report.with_(modules=pairs, total={**report.total, **total}, units={**report.units, **UNITS})


def _together(rows: Mapping[str, Sequence[Update | None]], i: int, j: int, seed: int) -> dict[str, float | None]:
    """Return the largest AWOM and the means of the others over the modules that both have."""
    both = [(row[i], row[j]) for row in rows.values() if row[i] is not None and row[j] is not None]
    work = [256 * (u.nnz + v.nnz) for u, v in both]  # type: ignore[union-attr]
    found = parallel_map(lambda one: pair(*one, seed=seed), both, weights=work)  # type: ignore[arg-type]
    if not found:
        return dict.fromkeys(UNITS)
    means = {key: sum(one[key] for one in found) / len(found) for key in UNITS}
    return {**means, "awom": max(one["awom"] for one in found)}


def pair(u: Sparse, v: Sparse, *, seed: int = 0) -> dict[str, float]:
    """Return the figures of two updates of one module."""
    mine, theirs = common(u.flat(), v.flat())
    xp = namespace(mine)
    shared = int(mine.shape[0])
    opposed = xp.sum(xp.take(u.numbers(), mine) * xp.take(v.numbers(), theirs) < 0) if shared else 0
    return {
        "awom": _spectral(u, v, seed),
        "awor": 1.0 - _filled(u, v) / float(u.matrix_shape[1] ** 2),
        "overlap": shared / max(min(u.nnz, v.nnz), 1),
        "opposed": float(opposed) / shared if shared else 0.0,
    }


def _spectral(u: Sparse, v: Sparse, seed: int) -> float:
    """Return |A1^T A2|_2 by power iteration on its Gram operator."""
    like = Operator(u).like
    x = seeds.signs(seeds.key_of(seed, "awom"), u.matrix_shape[1], 1, like=like)
    size = 0.0
    for _ in range(STEPS):
        x = x / max(_norm(x), 1e-300)
        y = u.rmatmul(v.matmul(x))
        size = _norm(y)
        x = v.rmatmul(u.matmul(y))
        if not _norm(x):
            break
    return size


def _norm(x: Array) -> float:
    wide = up(x, "float64")
    return sqrt(float((wide * wide).sum()))


def _filled(u: Sparse, v: Sparse) -> int:
    """Return how many entries of A1^T A2 some row contributes to."""
    (row1, col1), (row2, col2) = u.places(), v.places()
    xp, (m, n) = namespace(row1), u.matrix_shape
    ones = [xp.ones(r.shape, dtype=xp.float64, device=device_of(r)) for r in (row1, row2)]
    starts = [
        cast(xp.cumulative_sum(scatter_add(m, r, one), include_initial=True), "int64")
        for r, one in zip((row1, row2), ones, strict=True)
    ]
    seen = xp.zeros((n, n), dtype=xp.bool, device=device_of(row1))
    for i in range(m):
        (a, b), (c, d) = ((int(s[i]), int(s[i + 1])) for s in starts)
        if b > a and d > c:
            seen[col1[a:b][:, None], col2[c:d][None, :]] = True
    return int(xp.sum(cast(seen, "int64")))
