"""``peft_type: TINYLORA``: D = B (sum_k v_k P_k) A, with v shared by groups of modules (PEFT's ``TinyLoraConfig``).

A and B are factors of the base's truncated SVD, and are in the file. P is random; where it is not saved, it is drawn
from ``projection_seed`` plus the number of the module. Numbers, and groups, follow the order of modules in the model.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratools.core.lazy import Tensor, computed
from loratools.errors import FormatError
from loratools.formats.peft.module_order import in_order
from loratools.formats.peft.streams import Torch
from loratools.formats.peft.tuner import Module, Size, Tuner
from loratools.formats.peft.types import peft_type
from loratools.formats.peft.vera import RESAVE
from loratools.kinds.lowrank import LowRank
from loratools.leaf import Array
from loratools.linalg.namespace import up, working_dtype

A, B, P, V = "tinylora_A", "tinylora_B", "tinylora_P", "tinylora_v"


@peft_type("TINYLORA")
class TinyLora(Tuner):
    """A few numbers in the base's own directions; rank at most r."""

    type = "TINYLORA"
    leaves = (A, B, P)
    shared = (f"{V}.*",)

    def size(self, m: Module) -> Size:
        """Return (out, in); of an embedding (vocabulary, dim), as it is stored."""
        return m.axes(B, 2)[0], m.axes(A, 2)[1]

    def is_embedding(self, m: Module) -> bool:
        """Return False: the factors of an embedding lie as it is stored."""
        return False

    def weight(self, m: Module) -> LowRank:
        """Return B times (R A)."""
        a, b = m[A], m[B]
        rank, v = a.shape[0], m[f"{V}.{_group(m)}"]
        p: Tensor = m.need(P, (*v.shape, rank, rank)) if P in m else _drawn(m, v.shape[0], rank)
        dtype = working_dtype(a, b, v)

        def turned() -> Array:
            core = (up(v, dtype)[None, :] @ up(p, dtype).reshape(-1, rank * rank)).reshape(rank, rank)
            return core @ up(a, dtype)

        return LowRank(b, computed(a.shape, turned, dtype))


def _group(m: Module) -> int:
    """Return the number of the vector that the module uses."""
    count = len(m.model.modules)
    groups = max(1, round(count * (1.0 - m.fields.number("weight_tying", 0.0))))
    return 0 if groups == 1 else min(_number(m) // max(1, count // groups), groups - 1)


def _number(m: Module) -> int:
    """Return the number of the module among the adapted ones."""
    model = m.model

    def numbers() -> Mapping[str, int]:
        return {path: i for i, path in enumerate(in_order(model.modules, model.base, model.names, model.type))}

    return int(model.once("numbers", numbers)[m.path])


def _drawn(m: Module, count: int, rank: int) -> Array:
    if m.fields.flag("save_projection", True):
        raise FormatError("a tensor of this TINYLORA module is missing", parameter=m.path, expected=P)
    seed = m.fields.integer("projection_seed") + _number(m)
    return m.as_held(Torch(seed, RESAVE).normal((count, rank, rank), 1.0 / rank**0.5))
