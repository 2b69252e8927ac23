"""The matrices of an adapter one by one: a stack of experts counts as its experts; names tell layer and projection."""

from __future__ import annotations

from dataclasses import dataclass

from loratools.core.adapter import Adapter
from loratools.core.update import Update
from loratools.kinds.lowrank import low_ranks


@dataclass(frozen=True)
class Part:
    """One matrix (or vector) of an adapter: ``update`` acts on ``base[parameter]``, or on its slice ``expert``.

    ``turned``: the base stores it (in, out), so left and right change roles.
    """

    name: str
    parameter: str
    update: Update
    expert: int | None = None
    turned: bool = False


def parts(adapter: Adapter) -> tuple[Part, ...]:
    """Return the parts of an adapter in its order; experts of a stacked parameter are named ``parameter[e]``."""
    return tuple(part for name, update in adapter.items() for part in _parts(name, update, adapter))


def _parts(name: str, update: Update, adapter: Adapter) -> list[Part]:
    if update.kind == "stack":
        experts = low_ranks(update) or ()
        return [Part(f"{name}[{e}]", name, expert, e) for e, expert in enumerate(experts)]
    return [Part(name, name, update, turned=adapter.meta.layout.get(name, {}).get("stored") == "in_out")]


def layer_and_projection(name: str) -> tuple[str, str]:
    """Split a parameter name behind its last number; without a number the layer is empty.

    ``model.layers.3.mlp.up_proj.weight`` -> ``model.layers.3``, ``mlp.up_proj``.
    """
    pieces = name.removesuffix(".weight").split(".")
    last = max((i for i, piece in enumerate(pieces[:-1]) if piece.isdecimal()), default=-1)
    return ".".join(pieces[: last + 1]), ".".join(pieces[last + 1 :])
