"""``peft_type: SUPERTUNING``: chosen entries of W changed, and in its hybrid form a LoRA beside them (PEFT's config).

``supertuning_values`` (n,) at ``supertuning_indices`` (n,), flat positions in (out, in); ``supertuning_lora_A.weight``,
``supertuning_lora_B.weight`` with scale lora_alpha / r. Files without indices are refused: the largest |W| are chosen
again when PEFT loads them, and ties, the rule in half precision, fall as the device has it.
"""

from __future__ import annotations

from loratools.core.update import Delta
from loratools.errors import FormatError, UnsupportedError
from loratools.formats.peft.tuner import Module, Size, Tuner
from loratools.formats.peft.types import peft_type
from loratools.kinds.lowrank import LowRank
from loratools.kinds.sparse import coalesced
from loratools.kinds.sum import Sum
from loratools.linalg.namespace import cast, is_float

VALUES, INDICES = "supertuning_values", "supertuning_indices"
A, B = "supertuning_lora_A.weight", "supertuning_lora_B.weight"


@peft_type("SUPERTUNING")
class Supertuning(Tuner):
    """A sparse update, and a low-rank one."""

    type = "SUPERTUNING"
    leaves = (VALUES, INDICES, A, B)

    def size(self, m: Module) -> Size:
        """Return (out, in) where there are factors."""
        return (m[B].shape[0], m[A].shape[1]) if A in m or B in m else (None, None)

    def weight(self, m: Module) -> Delta:
        """Return the sum of both."""
        if INDICES not in m:
            raise UnsupportedError(
                "save_precomputed_indices=False: which entries were trained is not in the file, and ties among the "
                "largest |W| make it uncertain", parameter=m.path, expected=INDICES,
                hint="save it again with save_precomputed_indices=True on the machine that trained it",
            )  # fmt: skip
        values, index = m[VALUES], m.index(INDICES)
        if is_float(index.dtype) or index.shape != values.shape:
            raise FormatError("positions and values do not fit", expected=values.shape, got=index.shape)
        flat, n = cast(index.read(), "int64"), m.shape[1]
        sparse = coalesced(flat // n, flat % n, values.read(), m.shape)
        if A not in m and B not in m:
            return sparse
        return Sum((sparse, LowRank(m[B], m[A], m.scale(m[A].shape[0], "lora_alpha"))))
