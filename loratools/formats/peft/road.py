"""``peft_type: ROAD``: outputs rotated and scaled in pairs, the bias too (arXiv:2409.00119, PEFT's ``RoadConfig``).

Outputs come in groups of ``group_size``; entry q of a group's first half and of its second are a pair, multiplied by
((c, -s), (s', c')) with c = alpha cos theta, s = alpha sin theta. ``road_1`` has one angle and scale per pair (out / 2
numbers), ``road_2`` one per output, ``road_4`` one per entry of the matrix (2 out: per group those of c, then of s).
"""

from __future__ import annotations

from loratools.core.lazy import computed
from loratools.core.update import Array, Leaf, Update, namespace
from loratools.errors import FormatError
from loratools.formats.peft.tuner import Module, Size, Tuner
from loratools.formats.peft.types import peft_type
from loratools.kinds.block_diagonal import BlockDiagonal
from loratools.kinds.multiplied import Multiplied
from loratools.linalg.namespace import down, up

THETA, ALPHA = "road_theta", "road_alpha"
NUMBERS = {"road_1": 0.5, "road_2": 1.0, "road_4": 2.0}  # per output


@peft_type("ROAD")
class Road(Tuner):
    """Outputs turned pair by pair."""

    type = "ROAD"
    leaves = (THETA, ALPHA)

    def size(self, m: Module) -> Size:
        """Return out."""
        return int(m[THETA].shape[0] / NUMBERS[_variant(m)]), None

    def weight(self, m: Module) -> Update:
        """Return the rotation of the weight's rows."""
        return Multiplied(_turns(m), m.shape, 0)

    def bias(self, m: Module) -> Update | None:
        """Return the rotation of the bias, where the module has one."""
        return None if m.bias_shape is None else Multiplied(_turns(m), m.bias_shape, 0)


def _variant(m: Module) -> str:
    said = m.fields.text("variant", "road_1")
    if said not in NUMBERS:
        raise FormatError("adapter_config.json: variant is none of RoAd's", expected=", ".join(NUMBERS), got=said)
    return said


def _turns(m: Module) -> BlockDiagonal:
    """Return the 2 x 2 matrices, less the identity, of all pairs."""
    variant, group = _variant(m), m.fields.integer("group_size", 64, least=2)
    theta = m[THETA]
    alpha, out = m.need(ALPHA, theta.shape), int(theta.shape[0] / NUMBERS[variant])
    if group % 2 or out % group:
        raise FormatError("the outputs do not part into groups", parameter=m.path, expected=f"a multiple of {group}",
                          got=out)  # fmt: skip
    return BlockDiagonal(computed((out // 2, 2, 2), lambda: _pairs(theta, alpha, variant, group)), group // 2)


def _pairs(theta: Leaf, alpha: Leaf, variant: str, group: int) -> Array:
    t, a = up(theta, "float64"), up(alpha, "float64")
    xp = namespace(t)
    cosine, sine, half = a * xp.cos(t), a * xp.sin(t), group // 2
    if variant == "road_1":
        c, s = (xp.broadcast_to(x.reshape(-1, 1, half), (x.shape[0] // half, 2, half)) for x in (cosine, sine))
    elif variant == "road_2":
        c, s = cosine.reshape(-1, 2, half), sine.reshape(-1, 2, half)
    else:
        c, s = cosine.reshape(-1, 2, 2, half)[:, 0, ...], sine.reshape(-1, 2, 2, half)[:, 1, ...]
    first = xp.stack([c[:, 0, :] - 1.0, -s[:, 0, :]], axis=-1)
    second = xp.stack([s[:, 1, :], c[:, 1, :] - 1.0], axis=-1)
    return down(xp.stack([first, second], axis=-2).reshape(-1, 2, 2), "float32")
