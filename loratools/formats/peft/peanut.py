"""``peft_type: PEANUT``: W' = W + s B f(A W), a small network over the columns of W (arXiv:2410.01870).

``peanut_A.weight`` (r, out), ``peanut_B.weight`` (out, r), ``peanut_encoders.i.weight`` and
``peanut_decoders.i.weight`` (r, r) for i below ``depth``; s is ``scaling``, the activation ``act_fn``.
Given W, the update has rank r.
"""

from __future__ import annotations

from loratools.core.lazy import computed
from loratools.core.update import Leaf, Update, namespace
from loratools.errors import FormatError, UnsupportedError
from loratools.formats.peft.tuner import Module, Size, Tuner
from loratools.formats.peft.types import peft_type
from loratools.kinds.network import ACTIVATIONS, Network
from loratools.linalg.namespace import up

A, B, LAYERS = "peanut_A.weight", "peanut_B.weight", ("peanut_encoders", "peanut_decoders")


@peft_type("PEANUT")
class Peanut(Tuner):
    """A network of the base's columns."""

    type = "PEANUT"
    leaves = (A, B, *(f"{part}.*.weight" for part in LAYERS))

    def size(self, m: Module) -> Size:
        """Return out."""
        return m[B].shape[0], None

    def weight(self, m: Module) -> Update:
        """Return the network."""
        act, depth, r = m.fields.text("act_fn", "relu"), m.fields.integer("depth", 0), m[A].shape[0]
        if act not in ACTIVATIONS:
            raise UnsupportedError(f"the activation {act} is not computed by this version", parameter=m.path,
                                   expected=", ".join(ACTIVATIONS), got=f"act_fn {act}")  # fmt: skip
        layers = [m.need(f"{part}.{i}.weight", (r, r)) for part in LAYERS for i in range(depth)]
        stored = sum(leaf.startswith(LAYERS) for leaf in m.parts)
        if stored != 2 * depth:
            what = "the layers of the network are not as many as depth says"
            raise FormatError(what, parameter=m.path, expected=2 * depth, got=stored)
        scale = m.fields.number("scaling", 1.0)
        return Network(m[B], m[A], m.shape, _stacked(layers, r), scale, list(ACTIVATIONS).index(act))


def _stacked(layers: list[Leaf], r: int) -> Leaf | None:
    if not layers:
        return None
    return computed((len(layers), r, r), lambda: namespace(up(layers[0])).stack([up(t) for t in layers]))
