"""``peft_type: PVERA``: VeRA whose inner vector is drawn around a mean (PEFT's ``PveraConfig``); the mean is merged.

The first halves of ``pvera_lambda_d`` and of A give the mean, the second halves the variance, which only sampling uses.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import sqrt

from loratools.formats.peft.forms.form import Remark
from loratools.formats.peft.shared import Projections, narrowed
from loratools.formats.peft.streams import Torch
from loratools.formats.peft.tuner import Model, Module, Size, Tuner
from loratools.formats.peft.types import peft_type
from loratools.formats.peft.vera import RESAVE
from loratools.kinds.lowrank import LowRank


@peft_type("PVERA")
class Pvera(Tuner):
    """The mean of probabilistic VeRA; rank at most r."""

    type = "PVERA"
    leaves = ("pvera_lambda_b", "pvera_lambda_d")
    shared = ("pvera_A", "pvera_B")

    def size(self, m: Module) -> Size:
        """Return (out, None): the vectors do not tell how many columns of A are used."""
        return m["pvera_lambda_b"].shape[0], None

    def weight(self, m: Module) -> LowRank:
        """Return diag(b) B times diag(d) A, of the halves for the mean."""
        if "pvera_A" in m or "pvera_B" in m:
            drawn = Projections(m["pvera_A"], m["pvera_B"])
        else:
            drawn = m.model.once("projections", lambda: _drawn(m.model))
        vector = m["pvera_lambda_d"]
        return drawn.factors(m.shape, m["pvera_lambda_b"], vector.rows(0, vector.shape[0] // 2))

    def remarks(self, model: Model) -> Iterable[Remark]:
        """Tell where PEFT would sample."""
        if model.fields.flag("sample_at_inference"):
            yield "sample_at_inference is true: PEFT would draw anew at every call; this is the mean, as PEFT merges it"


def _drawn(model: Model) -> Projections:
    r, (out, width) = model.fields.integer("r", least=1), model.largest
    stream = Torch(model.fields.integer("projection_prng_key"), RESAVE)
    a = stream.uniform((2 * r, width), sqrt(3.0) * (sqrt(2.0) / sqrt(width)))
    return narrowed(a, stream.uniform((out, r), sqrt(3.0) * (sqrt(2.0) / sqrt(r))), model)
