"""Places of sparse coefficients that a file leaves out: the first n of a seeded permutation of all entries."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from loratools.core.lazy import computed
from loratools.core.update import Leaf
from loratools.errors import FormatError
from loratools.formats.peft.streams import Torch
from loratools.formats.peft.tuner import Module
from loratools.leaf import Array

_ALTERNATIVE = "convert the adapter to LoRA where it was trained (PEFT's save_as_lora)"


def drawn_places(m: Module, count: int) -> tuple[Leaf, Leaf]:
    """Return the rows and the columns (logical) of ``count`` coefficients, int64; drawn once per shape, when read."""
    out, n = m.shape
    if count > out * n:
        raise FormatError("more coefficients than entries", expected=f"at most {out * n}", got=count)
    seed = m.fields.integer("random_loc_seed", 777)
    Torch(seed, _ALTERNATIVE)  # without torch, say so now

    def draw() -> Array:
        return Torch(seed, _ALTERNATIVE).permutation(out * n)[:count].copy()

    drawn: Callable[[], Array] = m.model.once(f"places {out} {n} {count}", lambda: cache(draw))
    return computed((count,), lambda: drawn() // n, "int64"), computed((count,), lambda: drawn() % n, "int64")
