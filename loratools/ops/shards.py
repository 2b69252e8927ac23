"""split and join: an adapter cut into adapters whose entries are disjoint, and back, bit for bit (arXiv:2312.02923).

The factors are cut, not their product: shards are for storing, staging and ablating, and only together the adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from math import prod
from typing import Any

from loratools.core.adapter import Adapter
from loratools.core.update import Array, Leaf, Update, is_tensor, namespace, shape_of
from loratools.errors import MismatchError, UsageError
from loratools.linalg import seeds
from loratools.linalg.namespace import cast, dtype_name, is_float, to_numpy, up

MODES = ("all", "row", "column", "magnitude")


def split(adapter: Adapter, parts: int, *, by: str = "all", seed: int = 0) -> list[Adapter]:
    """Return ``parts`` adapters whose floating tensors hold disjoint entries of this one's, zeros elsewhere.

    ``by``: ``all`` deals entries out at random, ``row`` and ``column`` whole rows or columns (of the last two axes),
    ``magnitude`` by size, the largest first. Shares differ by at most one entry (row, column). Tensors of no floating
    dtype go to the first part's place in all of them. Raises UsageError for fewer than two parts or an unknown mode.
    """
    if by not in MODES or isinstance(parts, bool) or not isinstance(parts, int) or parts < 2:
        raise UsageError(
            "an adapter cannot be split so", expected=f"2 parts or more, by {', '.join(MODES)}", got=(parts, by)
        )
    made: list[dict[str, Update]] = [{} for _ in range(parts)]
    for name, update in adapter.items():
        for k, one in enumerate(_cut(update, parts, by, seed, name)):
            made[k][name] = one
    line = f"one of {parts} disjoint shards, by {by}, seed {seed}"
    meta = replace(adapter.meta, absorbed={})
    return [Adapter(updates, meta).with_history(line) for updates in made]


def join(shards: Sequence[Adapter]) -> Adapter:
    """Return the adapter that was split; bit for bit. Raises MismatchError where shards differ or overlap."""
    if not shards or any(list(s) != list(shards[0]) for s in shards):
        raise MismatchError("the shards do not belong together", got=", ".join(f"{len(s)} updates" for s in shards))
    updates = {name: _joined([s[name] for s in shards], name) for name in shards[0]}
    return Adapter(updates, shards[0].meta).with_history(f"joined from {len(shards)} shards")


def _cut(value: Any, parts: int, by: str, seed: int, where: str) -> list[Any]:
    """Return a kind, tuple or tensor in ``parts`` versions; numbers are repeated."""
    if isinstance(value, Update):
        cut = {f.name: _cut(getattr(value, f.name), parts, by, seed, f"{where}.{f.name}") for f in fields(value)}  # type: ignore[arg-type]
        return [replace(value, **{name: made[k] for name, made in cut.items()}) for k in range(parts)]  # type: ignore[type-var]
    if isinstance(value, tuple):
        inner = [_cut(part, parts, by, seed, f"{where}.{i}") for i, part in enumerate(value)]
        return [tuple(made[k] for made in inner) for k in range(parts)]
    if not is_tensor(value) or not is_float(dtype_name(value)):
        return [value] * parts
    x = value.read() if isinstance(value, Leaf) else value
    owner = _owners(x, parts, by, seed, where)
    xp = namespace(x)
    zero = xp.zeros_like(x)
    return [xp.where(owner == k, x, zero) for k in range(parts)]


def _owners(x: Array, parts: int, by: str, seed: int, where: str) -> Array:
    """Return whose entry it is, 0 .. parts - 1, of the shape of ``x`` (or one that broadcasts to it)."""
    shape = shape_of(x)
    xp = namespace(x)
    if by in ("row", "column") and len(shape) > 1:
        size = shape[-2] if by == "row" else shape[-1]
        dealt = _dealt(seeds.uniform(seeds.key_of(seed, f"split:{where}"), size, 1, like=up(x))[:, 0], parts)
        return dealt[:, None] if by == "row" else dealt
    scores = (
        -xp.abs(up(x)).reshape(-1)
        if by == "magnitude"
        else seeds.uniform(seeds.key_of(seed, f"split:{where}"), prod(shape), 1, like=up(x))[:, 0]
    )
    dealt = _dealt(scores, parts, bands=by == "magnitude")
    return dealt.reshape(shape)


def _dealt(scores: Array, parts: int, *, bands: bool = True) -> Array:
    """Return a number per score: the sorted scores in ``parts`` bands of sizes that differ by at most one."""
    xp = namespace(scores)
    n = scores.shape[0]
    place = xp.argsort(xp.argsort(scores, stable=True), stable=True)
    return cast(place, "int64") * parts // max(n, 1) if bands else cast(place, "int64") % parts


def _joined(values: Sequence[Any], where: str) -> Any:
    first = values[0]
    if any(type(v) is not type(first) for v in values):
        raise MismatchError("the shards do not belong together", parameter=where)
    if isinstance(first, Update):
        said = {f.name: _joined([getattr(v, f.name) for v in values], f"{where}.{f.name}") for f in fields(first)}  # type: ignore[arg-type]
        return replace(first, **said)  # type: ignore[type-var]
    if isinstance(first, tuple):
        return tuple(_joined(list(parts), where) for parts in zip(*values, strict=True))
    if not is_tensor(first) or not is_float(dtype_name(first)):
        return first
    return _united([v.read() if isinstance(v, Leaf) else v for v in values], where)


def _united(tensors: Sequence[Array], where: str) -> Array:
    """Return the tensor whose every entry is the one that is not zero; signs of zeros are those of any part."""
    done = tensors[0]
    xp = namespace(*tensors)
    for t in tensors[1:]:
        if shape_of(t) != shape_of(done) or dtype_name(t) != dtype_name(done):
            raise MismatchError("the shards do not belong together", parameter=where, expected=done.shape, got=t.shape)
        here, there = _bits(done), _bits(t)
        if bool(xp.any((here != 0) & (there != 0))):
            raise MismatchError("two shards hold one entry", parameter=where)
        done = xp.where(there != 0, t, done)
    return done


def _bits(x: Array) -> Array:
    """Return the entries as whole numbers of their bits, so that -0.0 and NaN are entries like others."""
    x = to_numpy(x)
    return x.view(f"uint{8 * x.dtype.itemsize}")
