"""LyCORIS files: kohya's grammar with LoCon's core, LoHa, LoKr, full differences and norms. docs/formats/lycoris.md"""

from __future__ import annotations

from typing import ClassVar

from loratools.core.update import Update
from loratools.formats import algebra
from loratools.formats.base import FORMATS
from loratools.formats.kohya import Kohya, flattened
from loratools.io.bundle import Bundle
from loratools.kinds.dense import Dense
from loratools.kinds.dora import Dora
from loratools.kinds.hadamard import Hadamard
from loratools.kinds.kronecker import Kronecker
from loratools.kinds.lowrank import LowRank
from loratools.kinds.tucker import Tucker


class Lycoris(Kohya):
    """What LyCORIS adds to kohya's files; OFT, BOFT, GLoRA, IA3 and T-LoRA are refused by name."""

    name = "lycoris"
    accepts: ClassVar[tuple[type[Update], ...]] = (LowRank, Dora, Tucker, Hadamard, Kronecker, Dense)
    module: ClassVar[str] = "lycoris.kohya"

    def declines(self, bundle: Bundle) -> str | None:
        """Claim flattened names with leaves that plain LoRA does not have."""
        reason = flattened(bundle)
        return reason or (None if algebra.is_lycoris(bundle.tensors) else "no factors beyond LoRA")


FORMATS.add("lycoris")(Lycoris())
