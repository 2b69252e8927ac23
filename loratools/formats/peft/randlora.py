"""``peft_type: RANDLORA``: sums of scaled random products (arXiv:2502.00987, PEFT's ``RandLoraConfig``).

With B (tallest, n, r) and A (r, 1, narrowest) shared, M = alpha / r times B flattened (n, r) by lambda A gamma
flattened (r, n), in PEFT's own two orders, is D where the inputs are the smaller side, else D^T. Files hold A and B
once for the model and once more under every module; with ``save_projection=False`` they are drawn again, in bf16 as
PEFT draws them.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import sqrt

from loratools.core.lazy import computed
from loratools.core.update import Leaf, shape_of
from loratools.errors import FormatError
from loratools.formats.peft import official
from loratools.formats.peft.shared import Projections, narrowed
from loratools.formats.peft.streams import Torch
from loratools.formats.peft.tuner import Model, Module, Size, Tuner
from loratools.formats.peft.types import peft_type
from loratools.formats.peft.vera import RESAVE
from loratools.kinds.lowrank import LowRank
from loratools.leaf import Array
from loratools.linalg.namespace import up, working_dtype

A, B, LAMBDA, GAMMA = "randlora_A", "randlora_B", "randlora_lambda", "randlora_gamma"


@peft_type("RANDLORA")
class RandLora(Tuner):
    """Full rank out of random bases."""

    type = "RANDLORA"
    leaves = (LAMBDA, GAMMA, A, B)
    shared = (A, B)

    def fork(self, keys: Iterable[str]) -> Tuner | None:
        """Return the reader of files whose bases are named otherwise."""
        return official.RandLora() if any(official.A in key for key in keys) else None

    def size(self, m: Module) -> Size:
        """Return nothing: gamma tells the smaller side, not which one it is."""
        return None, None

    def weight(self, m: Module) -> LowRank:
        """Return the product of both flattened bases, of inner size n r."""
        saved = A in m or B in m
        bases = Projections(m[A], m[B]) if saved else m.model.once("bases", lambda: _drawn(m.model))
        (rank, n), least, most = m.axes(LAMBDA, 2), min(m.shape), max(m.shape)
        gamma, (a, b) = m.need(GAMMA, (n, least)), bases
        fits = (
            (len(shape_of(a)), len(shape_of(b))) == (3, 3) and shape_of(a)[:2] == (rank, 1) and shape_of(b)[2] == rank
        )
        if not fits or shape_of(a)[2] < least or shape_of(b)[0] < most or shape_of(b)[1] < n:
            got = f"A {shape_of(a)}, B {shape_of(b)}"
            raise FormatError("the random bases do not fit the weight", parameter=m.path, expected=m.shape, got=got)
        dtype = working_dtype(a, b, m[LAMBDA], gamma)

        def tall() -> Array:
            x = b.rows(0, most) if isinstance(b, Leaf) else b[:most]
            return up(x, dtype)[:, :n, :].reshape(most, n * rank)

        def wide() -> Array:
            x = up(a, dtype)[:, :, :least] * up(m[LAMBDA], dtype)[:, :, None] * up(gamma, dtype)
            return x.reshape(rank * n, least)

        left, right = computed((most, n * rank), tall, dtype), computed((n * rank, least), wide, dtype)
        scale = m.scale(m.fields.integer("r", least=1), "randlora_alpha")
        if m.shape[1] == least:
            return LowRank(left, right, scale)
        return LowRank(right.T, left.T, scale)


def _drawn(model: Model) -> Projections:
    """Draw A first, then every base of B; all in bf16, or fp32 signs where they are sparse."""
    rank, largest = model.fields.integer("r", least=1), model.largest
    most, least = max(largest), min(largest)
    count = -(-least // rank)
    stream = Torch(model.fields.integer("projection_prng_key"), RESAVE)
    sparse = [flag for flag in ("very_sparse", "sparse") if model.fields.flag(flag)]
    if sparse:
        one_in = sqrt(least) if sparse[0] == "very_sparse" else 3.0
        a, b = stream.signs((rank, 1, least), one_in), stream.signs((most, count, rank), one_in)
    else:
        a, b = stream.bases((rank, 1, least), 1), stream.bases((most, 1, rank), count)
    return narrowed(a, b, model)
