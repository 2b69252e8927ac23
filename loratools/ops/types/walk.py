"""What types share: every weight of a layer under an adapter, beside its parameter of the base where that is wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import isfinite, sqrt
from statistics import median
from typing import Any

from loratools.core import generic
from loratools.core.adapter import Adapter
from loratools.core.update import Delta, Update
from loratools.errors import ConversionError, LoratoolsError, NeedsBaseError, NumericsError
from loratools.files import BaseLike, open_base
from loratools.formats.peft.config import altered_base
from loratools.kinds.lowrank import LowRank
from loratools.kinds.rebased import Rebased
from loratools.kinds.replace import Replace
from loratools.kinds.replace_rows import ReplaceRows
from loratools.kinds.stack import Stack
from loratools.leaf import Array, Leaf
from loratools.ops.base_names import base_names
from loratools.ops.placing import beside
from loratools.ops.tally_merge import wrong_base
from loratools.report import Report, Row

Which = Callable[[Update], bool]
One = Callable[[str, Update, Leaf | Array | None], tuple[Update, Mapping[str, Any]]]
UNITS = {
    "rank_before": "columns of the factors as stored",
    "rank_after": "columns of the factors as written",
    "relative_error": "Frobenius norm of (written - (W' - W)) / that of W' - W",
    "update_norm": "Frobenius norm of W' - W, where the way there was not exact",
    "energy": "share of |W' - W|^2 (Frobenius) that the new factors hold",
    "magnitude_agreement": "DoRA: correlation of magnitudes with this base's row norms, near 1 on the right base",
    "gain": "mean of magnitude / |row of W + D|: what a DoRA's magnitude does beyond its direction",
}


def walk(
    adapter: Adapter, base: BaseLike | None, wanted: Which, needs_base: Which, one: One
) -> tuple[Adapter, list[Row]]:
    """Apply ``one(name, update, its base parameter)`` to the weights of layers that are ``wanted``, one after another.

    Carried as they are: biases and other vectors, whole parameters, rows of tokens, stacks of experts. The base
    parameter is None where the update does not need one; an embedding that the adapter brings along is its own base.
    Raises NeedsBaseError naming the first update that needs the base and has none, MismatchError for other shapes.
    """
    parts = {name: u for name, u in adapter.items() if is_layer(_inner(u)) and wanted(_inner(u))}
    needing = [name for name, u in parts.items() if needs_base(_inner(u)) and not isinstance(u, Rebased)]
    opened = open_base(base)
    if needing and opened is None:
        raise NeedsBaseError(
            f"{len(needing)} {parts[needing[0]].kind} updates are only defined together with their base",
            file=adapter.meta.path, parameter=needing[0], hint="--base BASE, the model of training",
        )  # fmt: skip
    some = replace(adapter, updates={name: adapter[name] for name in needing})
    names = base_names(some, opened)[0] if opened is not None and needing else {}
    updates, rows = dict(adapter.updates), []
    for name, u in parts.items():
        w = u.value if isinstance(u, Rebased) else opened.leaf(names[name]) if opened and name in names else None
        try:
            new, row = one(name, _inner(u), None if w is None else beside(w, u))
            if not isfinite(row["relative_error"]):
                raise NumericsError("the update is not finite", hint="the adapter diverged in training, or is damaged")
        except LoratoolsError as error:
            raise error.at(file=adapter.meta.path, parameter=name) from error
        updates[name] = replace(u, update=new) if isinstance(u, Rebased) else new
        rows.append(row)
    return replace(adapter, updates=updates), rows


def is_layer(u: Update) -> bool:
    """True for what changes a weight of at least two dimensions by a rule of its own, and is no stack of experts."""
    return len(u.shape) > 1 and not isinstance(u, Replace | ReplaceRows | Stack)


def as_factors(u: Update) -> LowRank | None:
    """Return the update as one exact pair of factors; None where no exact route leads there."""
    if not isinstance(u, Delta):
        return None
    try:
        found = generic.convert(u, (LowRank,))
    except ConversionError:
        return None
    return found if isinstance(found, LowRank) else None


def finished(done: Adapter, source: Adapter, rows: Sequence[Row], name: str) -> Adapter:
    """Return the converted adapter with its report and a line of history."""
    sure = [row for row in rows if row.get("update_norm") is not None]
    square = sum(row["update_norm"] ** 2 for row in sure)
    lost = sum((row["relative_error"] * row["update_norm"]) ** 2 for row in sure)
    total = {
        "modules": len(rows),
        "inexact": len(sure),
        "rank_after": max((row["rank_after"] for row in rows if row["rank_after"] is not None), default=None),
        "relative_error": sqrt(lost / square) if square else 0.0,
        "worst": max((row["relative_error"] for row in rows), default=0.0),
    }
    agreements = [row["magnitude_agreement"] for row in rows if row.get("magnitude_agreement") is not None]
    warnings = wrong_base(median(agreements) if agreements else None)
    report = Report(f"loratools.to-{name}/1", tuple(rows), total, UNITS, tuple(warnings))
    meta = replace(done.meta, config=_begun_anew(done.meta.config))
    return replace(done, meta=meta, report=report).with_history(f"made {name}")


def _begun_anew(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a PEFT config without an initialisation of the old type (``mica`` ...), which may not go with the new."""
    idle = isinstance(config.get("init_lora_weights"), str) and altered_base(config) is None
    return {**config, "init_lora_weights": True} if idle else config


def _inner(u: Update) -> Update:
    return u.update if isinstance(u, Rebased) else u
