"""``peft_type: VERA``: D = diag(b) B diag(d) A, A and B random and shared (arXiv:2310.11454, PEFT's ``VeraConfig``).

Every module uses the first columns of A and the first rows of B. Files saved with ``save_projection=False`` hold the
vectors only; A and B are drawn again from ``projection_prng_key``, at the largest sizes among the adapted modules.
"""

from __future__ import annotations

from math import sqrt

from loratools.formats.peft.shared import Projections, narrowed
from loratools.formats.peft.streams import Torch
from loratools.formats.peft.tuner import Model, Module, Size, Tuner
from loratools.formats.peft.types import peft_type
from loratools.kinds.lowrank import LowRank

RESAVE = "save the adapter again with save_projection=True"


@peft_type("VERA")
class Vera(Tuner):
    """Vectors around shared projections; rank at most r."""

    type = "VERA"
    leaves = ("vera_lambda_b", "vera_lambda_d")
    shared = ("vera_A", "vera_B")

    def size(self, m: Module) -> Size:
        """Return (out, None): the vectors do not tell how many columns of A are used."""
        return m["vera_lambda_b"].shape[0], None

    def weight(self, m: Module) -> LowRank:
        """Return diag(b) B times diag(d) A."""
        if "vera_A" in m or "vera_B" in m:
            drawn = Projections(m["vera_A"], m["vera_B"])
        else:
            drawn = m.model.once("projections", lambda: _drawn(m.model))
        return drawn.factors(m.shape, m["vera_lambda_b"], m["vera_lambda_d"])


def _drawn(model: Model) -> Projections:
    r, (out, width) = model.fields.integer("r", least=1), model.largest
    stream = Torch(model.fields.integer("projection_prng_key"), RESAVE)
    a = stream.uniform((r, width), sqrt(3.0) * (sqrt(2.0) / sqrt(width)))
    return narrowed(a, stream.uniform((out, r), sqrt(3.0) * (sqrt(2.0) / sqrt(r))), model)
