"""How few bits an adapter may have."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from loratools.errors import UsageError
from loratools.linalg.medians import MEDIANS
from loratools.ops.ranks import parse_size

BITS = (1, 2, 3, 4, 8)
SCHEMES = ("lowbit", "binary-adapter")


def check_group(group: int) -> None:
    """Raise UsageError unless so many entries may share a scale."""
    if group and group < 8:
        raise UsageError("group out of range", expected="0 (whole vectors) or at least 8", got=group)


@dataclass(frozen=True)
class Budget:
    """How few bits: exactly one of ``bits`` for every component, ``avg_bits`` per stored weight (scales counted), and
    ``size``, the bytes of the whole file. ``group`` entries share a scale (0: a
    whole vector, and above 3 bits on average groups of 128 where these are better).

    Raises UsageError for contradictions and values out of range.
    """

    bits: int | None = None
    avg_bits: float | None = None
    size: int | str | None = None
    group: int = 0
    scheme: str = "lowbit"

    def __post_init__(self) -> None:
        given = [name for name in ("bits", "avg_bits", "size") if getattr(self, name) is not None]
        if len(given) != 1:
            got = ", ".join(given) or "none"
            raise UsageError("exactly one budget is needed", expected="bits, avg-bits or size", got=got)
        if self.scheme not in SCHEMES:
            raise UsageError("unknown scheme", expected=" or ".join(SCHEMES), got=self.scheme)
        if self.scheme == "binary-adapter" and (self.bits not in MEDIANS or self.group):
            sizes = ", ".join(map(str, MEDIANS))
            raise UsageError("Binary Adapters have one size for all and no groups", expected=f"bits {sizes}",
                             got=f"bits {self.bits}, group {self.group}")  # fmt: skip
        if self.scheme == "lowbit" and self.bits is not None and self.bits not in BITS:
            raise UsageError("bits out of range", expected=", ".join(map(str, BITS)), got=self.bits)
        if self.avg_bits is not None and not (isfinite(self.avg_bits) and 0 < self.avg_bits <= 16):
            raise UsageError("average bits out of range", expected="above 0 and at most 16", got=self.avg_bits)
        check_group(self.group)
        if self.size is not None:
            object.__setattr__(self, "size", parse_size(self.size))

    @property
    def words(self) -> str:
        """The budget, for the history."""
        said = (("bits", self.bits), ("avg-bits", self.avg_bits), ("size", self.size), ("group", self.group or None))
        scheme = "" if self.scheme == "lowbit" else f" {self.scheme}"
        return " ".join(f"{name} {value}" for name, value in said if value is not None) + scheme

    @property
    def suffix(self) -> str:
        """The budget, for a file name."""
        if self.bits is not None:
            return f"{self.bits}bit"
        return f"{self.avg_bits:g}bit" if self.avg_bits is not None else f"{self.size}B"
