"""``peft_type: HIRA``: W' = W o (1 + B A), no scale (PEFT's ``HiraConfig``; Huang et al., ICLR 2025)."""

from __future__ import annotations

from math import prod

from loratools.core.update import Update
from loratools.formats.peft.tuner import Module, Size, Tuner
from loratools.formats.peft.types import peft_type
from loratools.kinds.lowrank import LowRank
from loratools.kinds.modulated import Modulated


@peft_type("HIRA")
class Hira(Tuner):
    """The weight multiplied element by element by a low-rank matrix."""

    type = "HIRA"
    leaves = ("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B")

    def size(self, m: Module) -> Size:
        """Return (out, in[, *kernel]); an embedding's are (dim, vocabulary)."""
        prefix = _prefix(m)
        return m[f"{prefix}B"].shape[0], *m[f"{prefix}A"].shape[1:]

    def is_embedding(self, m: Module) -> bool:
        """Return whether the factors are those of an embedding."""
        return "hira_embedding_A" in m

    def weight(self, m: Module) -> Update:
        """Return the modulated weight; a convolution's factors are flattened."""
        a, b = m[f"{_prefix(m)}A"], m[f"{_prefix(m)}B"]
        a, b = a.reshape((a.shape[0], prod(a.shape[1:]))), b.reshape((b.shape[0], prod(b.shape[1:])))
        return Modulated(LowRank(b, a, 1.0, m.shape))


def _prefix(m: Module) -> str:
    return "hira_embedding_" if "hira_embedding_A" in m else "hira_"
