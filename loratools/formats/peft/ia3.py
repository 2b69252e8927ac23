"""``peft_type: IA3``: outputs, or inputs of feed-forward modules, times learned numbers (arXiv:2205.05638).

``ia3_l`` is (out, 1), or (1, in) for modules of ``feedforward_modules``; (1, channels, 1, ...) for a convolution.
Scaled outputs scale the bias, too.
"""

from __future__ import annotations

import re
from math import prod

from loratools.core.update import Update
from loratools.errors import FormatError, UnsupportedError
from loratools.formats.peft.tuner import Module, Size, Tuner
from loratools.formats.peft.types import peft_type
from loratools.kinds.scaled import Scaled

LEAF = "ia3_l"


@peft_type("IA3")
class Ia3(Tuner):
    """Slices of the weight scaled, and of the bias."""

    type = "IA3"
    leaves = (LEAF,)

    def size(self, m: Module) -> Size:
        """Return the one side that the vector tells; the rank of a convolution's says that of its weight."""
        shape = m[LEAF].shape
        side = (None, prod(shape)) if _scales_inputs(m) else (prod(shape), None)
        return (*side, *(None for _ in shape[2:]))

    def weight(self, m: Module) -> Update:
        """Return the scaled weight."""
        axis = int(_scales_inputs(m))
        gain = m[LEAF]
        if m.shape[axis] != prod(gain.shape):
            what = "IA3 on the inputs of a grouped convolution: every group has its own"
            raise UnsupportedError(what, expected=m.shape[axis], got=gain.shape)
        return Scaled(gain.reshape((prod(gain.shape),)), m.shape, axis)

    def bias(self, m: Module) -> Update | None:
        """Return the scaled bias, where outputs are scaled and the module has one."""
        shape = m.bias_shape
        if _scales_inputs(m) or shape is None:
            return None
        return Scaled(m[LEAF].reshape(shape), shape)


def _scales_inputs(m: Module) -> bool:
    """Tell by the shape of the vector; of a convolution's by the config, matched as PEFT does."""
    shape = m[LEAF].shape
    if len(shape) == 2:
        if 1 not in shape:
            raise FormatError("this is no vector of IA3", parameter=m.path, expected="(out, 1) or (1, in)", got=shape)
        return shape[0] == 1 and (shape[1] != 1 or _feedforward(m))
    return _feedforward(m)


def _feedforward(m: Module) -> bool:
    said = m.fields.config.get("feedforward_modules")
    if isinstance(said, str):
        return re.fullmatch(said, m.path) is not None
    if not isinstance(said, list):
        expected = "a list of names, or a pattern"
        raise FormatError("adapter_config.json: feedforward_modules is missing", expected=expected, got=repr(said)[:80])
    return any(m.path.endswith(str(name)) for name in said)
