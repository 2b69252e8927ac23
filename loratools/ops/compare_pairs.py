"""All pairs of adapters at one matrix: products, energies inside each other's subspaces, principal angles, signs.

Figures are square tables over adapters, kept as a mapping of their names:

``inner``            <D_i, D_j>
``inside``           |P_j D_i P_j|^2, P_j the projections on j's column and row spaces
``angle_output``     mean principal angle of the column spaces in degrees; ``angle_input`` of the row spaces
``least_output``     the smallest principal angle; ``least_input`` likewise (90 where there is nothing to compare)
``counted``          1 where both have the module
``conflict``         sampled entries whose signs differ; ``sampled`` those where neither is zero

Over modules all are added but the least angles, of which the smaller one counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt, pi

from loratools.core.update import Array, namespace
from loratools.linalg.namespace import up
from loratools.ops.compare_bases import Bases
from loratools.ops.compare_signs import signs

Table = dict[str, Array]

BLOCK = 1 << 20
"""Entries of overlaps held at a time."""

RIGHT_ANGLE = 90.0


def added(x: Table, y: Table) -> Table:
    """Return the table of two modules together."""
    xp = namespace(*x.values())
    return {k: xp.minimum(v, y[k]) if k.startswith("least") else v + y[k] for k, v in x.items()}


def turned(x: Table) -> Table:
    """Return the table seen from the other side: rows become columns."""
    named = {**x, "inside": x["outside"], "outside": x["inside"]}
    return {k: v.mT for k, v in named.items()}


def joined(cells: Sequence[Sequence[Table]]) -> Table:
    """Return one table out of blocks of adapters."""
    xp = namespace(*cells[0][0].values())
    lines = [{k: xp.concat([cell[k] for cell in line], axis=1) for k in line[0]} for line in cells]
    return {k: xp.concat([line[k] for line in lines], axis=0) for k in lines[0]}


def spread(x: Table, places: Sequence[int], count: int) -> Table:
    """Return the table of ``count`` adapters out of that of those in ``places``: the others lack the module."""
    if len(places) == count:
        return x
    xp = namespace(*x.values())
    eye = xp.eye(count, dtype=xp.float64, device=x["inner"].device)
    at = xp.take(eye, xp.asarray(list(places), device=eye.device), axis=0)
    offset = {"least_output": RIGHT_ANGLE, "least_input": RIGHT_ANGLE}
    return {k: at.mT @ (v - offset.get(k, 0.0)) @ at + offset.get(k, 0.0) for k, v in x.items()}


def cell(x: Bases, y: Bases, sample: int) -> Table:
    """Return the table of two blocks of adapters (p, q), with ``outside`` = |P_i D_j P_i|^2 for the other triangle.

    With C_u = U_i^T U_j and C_v = V_i^T V_j every figure is a product of r x r matrices. Cost per pair
    O((m + n) r^2 + r^3), in blocks; signs beside that.
    """
    step = max(1, isqrt(BLOCK // (int(x.u.shape[2]) * int(y.u.shape[2]))))
    parts = [x.part(i, i + step) for i in range(0, len(x), step)]
    others = parts if x is y else [y.part(i, i + step) for i in range(0, len(y), step)]
    cells: list[list[Table]] = []
    for i, part in enumerate(parts):
        known = (
            [turned(cells[j][i]) for j in range(i)] if x is y else []
        )  # the table of a block with itself is symmetric
        cells.append([*known, *(_rows(part, other) for other in others[len(known) :])])
    conflict, sampled = signs(x, y, sample)
    return {**joined(cells), "conflict": conflict, "sampled": sampled}


def _rows(x: Bases, y: Bases) -> Table:
    xp = namespace(x.u)
    cu, cv = _overlaps(x.u, y.u), _overlaps(x.v, y.v)
    there = xp.matrix_transpose(cu) @ x.core[:, None, ...] @ cv  # U_j^T D_i V_j
    here = cu @ y.core[None, ...] @ xp.matrix_transpose(cv)  # U_i^T D_j V_i
    angle_output, least_output = _angles(cu, xp.minimum(x.left[:, None], y.left[None, :]))
    angle_input, least_input = _angles(cv, xp.minimum(x.right[:, None], y.right[None, :]))
    return {
        "inner": _sum(there * y.core[None, ...]),
        "inside": _sum(there * there),
        "outside": _sum(here * here),
        "angle_output": angle_output,
        "angle_input": angle_input,
        "least_output": least_output,
        "least_input": least_input,
        "counted": xp.ones_like(angle_output),
    }


def _overlaps(x: Array, y: Array) -> Array:
    """Return x_i^T y_j: x (p, m, r), y (q, m, s) -> (p, q, r, s), by one matrix product."""
    xp = namespace(x)
    (p, m, r), (q, _, s) = x.shape, y.shape
    flat = xp.permute_dims(x, (0, 2, 1)).reshape(p * r, m) @ xp.permute_dims(y, (1, 0, 2)).reshape(m, q * s)
    return xp.permute_dims(flat.reshape(p, r, q, s), (0, 2, 1, 3))


def _sum(x: Array) -> Array:
    return up(namespace(x).sum(x, axis=(2, 3)), "float64")


def _angles(overlap: Array, counts: Array) -> tuple[Array, Array]:
    """Return mean and smallest principal angle in degrees of every pair; right angles where a space is empty.

    Squared cosines are the eigenvalues of C^T C, at two thirds of the cost of singular values of C. In fp32: an angle
    within 0.03 degrees of 0 or 90 may read as that.
    """
    xp = namespace(overlap)
    squares = xp.flip(xp.linalg.eigvalsh(xp.matrix_transpose(overlap) @ overlap), axis=-1)
    angles = xp.acos(xp.sqrt(xp.clip(up(squares, "float64"), 0.0, 1.0))) * (180 / pi)
    among = xp.arange(squares.shape[-1], device=overlap.device) < counts[..., None]
    total = xp.sum(xp.where(among, angles, 0.0), axis=-1)
    some = counts > 0
    mean = xp.where(some, total / xp.where(some, up(counts, "float64"), 1.0), RIGHT_ANGLE)
    return mean, xp.where(some, angles[..., 0], RIGHT_ANGLE)
