"""``peft_type: FROD``: W' = U (S + diag(l)) V^T, the base in a basis shared by its modules (PEFT's ``FrodConfig``).

``frod_lambda_l`` (in,), ``frod_lambda_s_values`` (n,) per module; per category of modules ``frod_V`` (in, in) and the
places ``frod_s_indices`` (2, n) of S, under ``base_model.``. V comes from a joint decomposition of all layers, whose
signs and order no file tells: one saved with ``save_projection=False`` is refused.
"""

from __future__ import annotations

from loratools.core.update import Update
from loratools.errors import FormatError, UnsupportedError
from loratools.formats.peft.tuner import Module, Size, Tuner
from loratools.formats.peft.types import peft_type
from loratools.kinds.joint import Joint
from loratools.kinds.sparse import coalesced

DIAGONAL, VALUES = "frod_lambda_l", "frod_lambda_s_values"


@peft_type("FROD")
class Frod(Tuner):
    """The base's coordinates in a shared basis, replaced."""

    type = "FROD"
    leaves = (DIAGONAL, VALUES)
    shared = ("frod_V.*", "frod_s_indices.*", "frod_s_size.*")

    def size(self, m: Module) -> Size:
        """Return in."""
        return None, m[DIAGONAL].shape[0]

    def weight(self, m: Module) -> Update:
        """Return the new coordinates, with the basis of the module's category."""
        category, n = _category(m.path), m[DIAGONAL].shape[0]
        if f"frod_V.{category}" not in m:
            if any(leaf.startswith("frod_V.") for leaf in m.model.shared):
                what = "the basis of this category is missing"
                raise FormatError(what, parameter=m.path, expected=f"frod_V.{category}")
            raise UnsupportedError(
                "save_projection=False: FRoD's basis comes from a joint decomposition over all layers, whose signs and "
                "order cannot be found again", parameter=m.path, expected=f"frod_V.{category}",
                hint="save it again with save_projection=True on the machine that trained it",
            )  # fmt: skip
        values, places = m[VALUES], m.index(f"frod_s_indices.{category}").read()
        if places.shape != (2, *values.shape):
            raise FormatError("places and values do not fit", expected=(2, *values.shape), got=places.shape)
        rest = coalesced(places[0, :], places[1, :], values.read(), (n, n))
        return Joint(m.need(f"frod_V.{category}", (n, n)), m[DIAGONAL], rest, m.shape)


def _category(path: str) -> str:
    """Return PEFT's name for modules of one role: the last two parts of the path, the last after a number."""
    parts = path.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{parts[-2]}_{parts[-1]}"
