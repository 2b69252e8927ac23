"""S2FT (arXiv:2412.06289): a few heads and channels trained in place, in a model whose rows were reordered for it.

The fused model is saved whole and permuted, and neither the permutation nor the selection with it. Frozen rows tell
both: a row of ``gate_proj`` (or a head of ``q_proj``) is found in the base bit for bit. Read with ``reader = "s2ft"``
and the base; what changed comes back as rows or columns, exactly of that rank, in the base's own order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from loratools.core.update import Leaf
from loratools.errors import MismatchError, UnsupportedError
from loratools.formats.papers.system import Reading, System, system
from loratools.kinds.lowrank import LowRank
from loratools.leaf import Array
from loratools.linalg.namespace import to_numpy, up

MATCHED = 0.999  # of the frozen rows; below it the base is another, or they were trained, too
_LAYER = re.compile(r"(.+\.layers\.\d+)\.mlp\.gate_proj\.weight")


@system("s2ft")
class S2ft(System):
    """Full checkpoints with permuted heads and channels."""

    settings = ("heads",)

    def claims(self, tensors: Mapping[str, Leaf]) -> bool:
        """Claim nothing: its checkpoints look like any other; a manifest names the reader."""
        return False

    def carries(self, key: str) -> bool:
        """Carry nothing but what equals the base; see read."""
        return False

    def read(self, r: Reading) -> None:
        """Add the changed rows and columns of every layer; the frozen parameters must equal the base's."""
        layers = [m[1] for key in r.tensors if (m := _LAYER.fullmatch(key))]
        if not layers:
            raise UnsupportedError("no Llama-like layers in this checkpoint", expected="...mlp.gate_proj.weight")
        r.place(r.tensors)
        seen: set[str] = set()
        for layer in layers:
            seen |= _mlp(r, layer) | _attention(r, layer, int(r.number("heads", default=0)))
        for key in [k for k in r.tensors if k not in seen]:
            if not np.array_equal(_read(r.tensors[key]), _read(r.weight(key, "S2FT"))):
                raise UnsupportedError("a parameter outside heads and channels was trained", parameter=key)
        first = next(iter(r.updates))
        r.used[first] |= {key: leaf for key, leaf in r.tensors.items() if key not in r.used[first]}


def _mlp(r: Reading, layer: str) -> set[str]:
    gate, up_, down = (f"{layer}.mlp.{p}_proj.weight" for p in ("gate", "up", "down"))
    for name in (gate, up_, down):
        if name not in r.tensors:
            raise UnsupportedError("a layer of this checkpoint is not Llama's", parameter=layer, expected=name)
    order = _matched(_read(r.tensors[gate]), _read(r.weight(gate, "S2FT")), gate)
    _changed(r, up_, order, axis=0)
    _changed(r, down, order, axis=1)
    return {gate, up_, down}


def _attention(r: Reading, layer: str, heads: int) -> set[str]:
    names = {p: f"{layer}.self_attn.{p}_proj.weight" for p in "qkvo"}
    if any(name not in r.tensors for name in names.values()):
        return set()
    if all(np.array_equal(_read(r.tensors[n]), _read(r.weight(n, "S2FT"))) for n in names.values()):
        return set(names.values())
    if r.tensors[names["k"]].shape != r.tensors[names["q"]].shape:
        what = "S2FT indexes heads of grouped queries wrongly: such attention cannot be put back in order"
        raise UnsupportedError(what, parameter=layer, expected="as many key as query heads")
    if heads < 1 or r.tensors[names["q"]].shape[0] % heads:
        got, expected = r.tensors[names["q"]].shape, "settings = {heads = NUMBER} in a manifest"
        raise UnsupportedError(
            "permuted attention, and no number of heads", parameter=layer, expected=expected, got=got
        )
    q, base = _read(r.tensors[names["q"]]), _read(r.weight(names["q"], "S2FT"))
    width = q.shape[0] // heads
    blocks = _matched(q.reshape(heads, -1), base.reshape(heads, -1), names["q"])
    order = (blocks[:, None] * width + np.arange(width)).reshape(-1)
    for p, axis in (("k", 0), ("v", 0), ("o", 1)):
        _changed(r, names[p], order, axis=axis)
    return set(names.values())


def _read(leaf: Leaf) -> Array:
    return to_numpy(leaf)


def _matched(rows: Array, base: Array, name: str) -> Array:
    """Return where in the base each row is, by its bits. Raises :class:`MismatchError` below ``MATCHED`` of them."""
    found: dict[bytes, list[int]] = {}
    for i, row in enumerate(base):
        found.setdefault(row.tobytes(), []).append(i)
    places = [found.get(row.tobytes(), []) for row in rows]
    matched = sum(len(p) == 1 for p in places) / len(places)
    if matched < MATCHED or rows.shape != base.shape:
        got = f"{matched:.2%} of the rows of this frozen parameter are in the base once"
        raise MismatchError("the permutation cannot be recovered", parameter=name, expected=f"{MATCHED:.1%}", got=got)
    order = np.array([p[0] if len(p) == 1 else -1 for p in places])
    missing = np.setdiff1d(np.arange(len(order)), order)
    if len(missing) == 1:
        order[order < 0] = missing
    if sorted(order) != list(range(len(order))):
        raise MismatchError("the permutation cannot be recovered", parameter=name, got="rows that occur twice")
    return order


def _changed(r: Reading, name: str, order: Array, *, axis: int) -> None:
    """Add what changed of a parameter whose rows or columns are permuted: those, times the one-hot of their places."""
    tuned, base = _read(r.tensors[name]), _read(r.weight(name, "S2FT"))
    moved: Any = np.empty_like(tuned)
    if axis == 0:
        moved[order] = tuned
    else:
        moved[:, order] = tuned
    differs = np.flatnonzero((moved != base).any(axis=1 - axis))
    if not differs.size:
        return
    exact = [np.asarray(up(x, "float64")) for x in (moved, base)]
    ones = np.zeros((base.shape[axis], differs.size), np.float32)
    ones[differs, np.arange(differs.size)] = 1.0
    change = (exact[0] - exact[1]).astype(np.float32)
    update = LowRank(ones, change[differs]) if axis == 0 else LowRank(np.ascontiguousarray(change[:, differs]), ones.T)
    side = "rows" if axis == 0 else "columns"
    r.add(name, update, {name: r.tensors[name]}, changed=[int(i) for i in differs], side=side)
    r.remarks.append(f"{name}: {differs.size} of {base.shape[axis]} {side} changed")
