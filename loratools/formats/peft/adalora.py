"""``peft_type: ADALORA``: D = s B diag(E) A (arXiv:2303.10512, PEFT's ``AdaLoraConfig``).

PEFT divides by ``init_r`` plus 1e-5, whatever rank the budget has left, and multiplies by ``lora_alpha``, or by
``init_r`` where that is not positive. ``rank_pattern`` says which directions were pruned; the tensors hold the others.
"""

from __future__ import annotations

from loratools.core.lazy import computed
from loratools.formats.peft.tuner import Module, Size, Tuner
from loratools.formats.peft.types import peft_type
from loratools.kinds.lowrank import LowRank
from loratools.linalg.namespace import up, working_dtype


@peft_type("ADALORA")
class AdaLora(Tuner):
    """Low-rank factors with their singular values apart."""

    type = "ADALORA"
    leaves = ("lora_A", "lora_E", "lora_B")

    def size(self, m: Module) -> Size:
        """Return (out, in), in flat over a kernel."""
        if _is_pruned(m):
            return m.parts["lora_B"][1].shape[0], m.parts["lora_A"][1].shape[1]
        return m.axes("lora_B", 2)[0], m.axes("lora_A", 2)[1]

    def weight(self, m: Module) -> LowRank | None:
        """Return the product, E taken into A; None where the budget left no rank at all."""
        if _is_pruned(m):
            return None
        a = m["lora_A"]
        e = m.need("lora_E", (a.shape[0], 1))
        alpha, init = m.fields.number("lora_alpha"), m.fields.integer("init_r", least=1)
        scale = (alpha if alpha > 0 else init) / (init + 1e-5)
        dtype = working_dtype(a, e)
        scaled = computed(a.shape, lambda: up(e, dtype) * up(a, dtype), dtype)
        return LowRank(m["lora_B"], scaled, scale, m.shape)


def _is_pruned(m: Module) -> bool:
    """Return whether all factors are there, without a single direction."""
    shapes = [m.parts[leaf][1].shape for leaf in ("lora_A", "lora_E", "lora_B") if leaf in m.parts]
    return [len(shape) for shape in shapes] == [2, 2, 2] and shapes[0][0] == shapes[1][0] == shapes[2][1] == 0
