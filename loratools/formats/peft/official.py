"""Types whose authors' own fork of PEFT writes other tensors than PEFT does, under the same ``peft_type``.

| type | tensors | difference |
|---|---|---|
| RANDLORA | ``randbasis_A`` (r, 1, .), ``randbasis_B`` (., n, r) | scale alpha / r / sqrt(n); PEFT: alpha / r |
| UNILORA | ``unilora_logits_A``, ``unilora_norm_A`` (and ``_B``), ``unilora_vector_bank`` | every place is in it |
"""

from __future__ import annotations

from math import sqrt

from loratools.core.lazy import computed
from loratools.core.update import Leaf
from loratools.errors import FormatError
from loratools.formats.peft.tuner import Module, Size, Tuner
from loratools.kinds.lowrank import LowRank
from loratools.leaf import Array
from loratools.linalg.namespace import cast, namespace, up, working_dtype

A, B, LAMBDA, GAMMA = "randbasis_A", "randbasis_B", "randlora_lambda", "randlora_gamma"
PLACES, NORMS, BANK = "unilora_logits_{}", "unilora_norm_{}", "unilora_vector_bank"


class RandLora(Tuner):
    """RandLoRA of github.com/PaulAlbert31/RandLoRA: flattened as PEFT does it, scaled otherwise."""

    type = "RANDLORA"
    leaves = (LAMBDA, GAMMA, A, B)
    shared = (A, B)

    def size(self, m: Module) -> Size:
        """Return nothing: gamma tells the smaller side, not which one it is."""
        return None, None

    def weight(self, m: Module) -> LowRank:
        """Return the product of both flattened bases, of inner size n r."""
        a, b, rows, gamma = m[A], m[B], m[LAMBDA], m[GAMMA]
        least, most = min(m.shape), max(m.shape)
        fits = (
            len(a.shape) == 3 and len(b.shape) == 3 and len(rows.shape) == 2 and gamma.shape == (rows.shape[1], least)
        )
        if not fits or a.shape[0] != rows.shape[0] or b.shape[2] != rows.shape[0] or a.shape[1] != 1:
            got = f"A {a.shape}, B {b.shape}, lambda {rows.shape}, gamma {gamma.shape}"
            raise FormatError("the random bases do not fit the weight", parameter=m.path, expected=m.shape, got=got)
        (rank, n), dtype = rows.shape, working_dtype(a, b, rows, gamma)
        if a.shape[2] < least or b.shape[0] < most or b.shape[1] < n:
            raise FormatError("the random bases are too small", parameter=m.path, expected=m.shape, got=b.shape)

        def tall() -> Array:
            return up(b, dtype)[:most, :n, :].reshape(most, n * rank)

        def wide() -> Array:
            x = up(rows, dtype)[:, :, None] * up(a, dtype)[:, :, :least] * up(gamma, dtype)[None, :, :]
            return x.reshape(rank * n, least)

        scale = m.scale(m.fields.integer("r", least=1), "randlora_alpha") / sqrt(n)
        left, right = computed((most, n * rank), tall, dtype), computed((n * rank, least), wide, dtype)
        return LowRank(left, right, scale) if m.shape[1] == least else LowRank(right.T, left.T, scale)


class UniLora(Tuner):
    """Uni-LoRA of github.com/KaiyangLi1992/Uni-LoRA: places and factors of every entry are in the file."""

    type = "UNILORA"
    leaves = (*(PLACES.format(s) for s in "AB"), *(NORMS.format(s) for s in "AB"), BANK)
    shared = (BANK,)

    def size(self, m: Module) -> Size:
        """Return (out, in)."""
        return m.index(PLACES.format("B")).shape[0], m.index(PLACES.format("A")).shape[1]

    def weight(self, m: Module) -> LowRank:
        """Return the gathered factors."""
        return LowRank(_gathered(m, "B"), _gathered(m, "A"))


def _gathered(m: Module, side: str) -> Leaf:
    places, bank = m.index(PLACES.format(side)), m[BANK]
    norms = m.need(NORMS.format(side), places.shape)

    def gather() -> Array:
        vector = up(bank)
        return namespace(vector).take(vector, cast(places.read(), "int64").reshape(-1)).reshape(places.shape) * up(
            norms
        )

    return computed(places.shape, gather)
