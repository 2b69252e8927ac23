"""How small? The ways of asking for ranks, as rules from singular values to ranks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from loratools.consumers.ranks import LEGAL_RANKS
from loratools.core.update import Array
from loratools.errors import UsageError
from loratools.linalg import select
from loratools.linalg.namespace import namespace

NO_CAP = 1 << 30
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Target:
    """What was asked for: exactly one of ``rank``, ``energy``, ``error``, ``size`` (bytes of the file) and ``noise``.

    ``max_rank`` caps any of them, ``multiple`` rounds ranks up, ``uniform`` gives every module the largest rank chosen,
    ``consumer`` rounds that rank up to one its program accepts. ``nested`` orders the channels by what they hold; alone
    it keeps every rank.
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    size: int | None = None
    noise: bool = False
    max_rank: int | None = None
    multiple: int = 1
    uniform: bool = False
    consumer: str | None = None
    nested: bool = False

    def __post_init__(self) -> None:
        given = [n for n in ("rank", "energy", "error", "size") if getattr(self, n) is not None]
        given += ["rank=noise"] if self.noise else []
        if len(given) != 1 and not (self.nested and not given):
            raise UsageError(
                "exactly one target is needed", expected="rank, energy, error or size", got=", ".join(given) or "none"
            )
        _whole("rank", self.rank)
        _whole("max_rank", self.max_rank)
        _whole("rank_multiple", self.multiple)
        _whole("size", self.size)
        for name in ("energy", "error"):
            share = getattr(self, name)
            if share is not None and not isinstance(share, int | float):
                raise UsageError(f"{name} is no number", got=repr(share))
        if self.energy is not None and not 0.0 < self.energy <= 1.0:
            raise UsageError("energy out of range", expected="a share above 0 and at most 1", got=self.energy)
        if self.error is not None and not 0.0 <= self.error < 1.0:
            raise UsageError(
                "error out of range", expected="a relative error of at least 0 and below 1", got=self.error
            )
        if self.consumer is not None and self.consumer not in LEGAL_RANKS:
            raise UsageError("unknown consumer", expected=", ".join(LEGAL_RANKS), got=self.consumer)

    @classmethod
    def of(
        cls,
        *,
        rank: int | str | None = None,
        energy: float | None = None,
        error: float | None = None,
        size: int | str | None = None,
        max_rank: int | None = None,
        rank_multiple: int = 1,
        uniform: bool = False,
        consumer: str | None = None,
        nested: bool = False,
    ) -> Target:
        """Return the target that these words of a user name; ``rank`` may be "noise" and ``size`` "20MB"."""
        return cls(
            rank=_rank(rank),
            energy=energy,
            error=error,
            size=None if size is None else parse_size(size),
            noise=rank == "noise",
            max_rank=max_rank,
            multiple=rank_multiple,
            uniform=uniform,
            consumer=consumer,
            nested=nested,
        )

    @property
    def cap(self) -> int:
        """Largest rank allowed."""
        return self.max_rank or NO_CAP

    @property
    def enough(self) -> int | None:
        """Largest rank that the target can ask of a module; None where that depends on its spectrum."""
        return None if self.rank is None else self.rounded(self.rank)

    @property
    def is_global(self) -> bool:
        """True if the rank of one module depends on the others', so that all spectra are needed first."""
        return self.size is not None or self.uniform or self.consumer is not None

    @property
    def pads(self) -> bool:
        """True if a module may get more columns than it has."""
        return self.uniform or self.consumer is not None or self.multiple > 1

    def rank_for(self, s: Array, edge: float = 0.0) -> int:
        """Return the rank that the target gives a module with singular values ``s``, before any padding or budget.

        ``edge`` is the module's noise edge, for the target that asks for it: what stands above it is kept.
        """
        if self.noise:
            wanted = max(1, int(namespace(s).sum(s > edge)))
        elif self.rank is not None:
            wanted = self.rank
        elif self.energy is not None:
            wanted = select.rank_for_energy(s, self.energy)
        elif self.error is not None:
            wanted = select.rank_for_error(s, self.error)
        else:
            wanted = NO_CAP
        return self.rounded(min(wanted, s.shape[0]))

    def rounded(self, rank: int) -> int:
        """Return the rank rounded up to the multiple, and not above the cap."""
        return min(-(-rank // self.multiple) * self.multiple, self.cap)

    def one_for_all(self, ranks: Mapping[str, int]) -> int:
        """Return the one rank of all modules: the largest, rounded up to what the consumer accepts."""
        largest = max(ranks.values(), default=1)
        if self.consumer is None:
            return largest
        legal = [r for r in LEGAL_RANKS[self.consumer] if largest <= r <= self.cap]
        if not legal:
            raise UsageError(
                f"{self.consumer} accepts no rank as large as this within the cap",
                expected=", ".join(map(str, LEGAL_RANKS[self.consumer])),
                got=f"{largest}" + (f", max_rank {self.max_rank}" if self.max_rank else ""),
                hint="give a smaller target, or another --max-rank",
            )
        return legal[0]

    @property
    def words(self) -> str:
        """The target in words, for reports and histories."""
        numbers = ("rank", "energy", "error", "size", "max_rank")
        parts = ["rank=noise"] if self.noise else []
        parts += [f"{name}={value}" for name in numbers if (value := getattr(self, name)) is not None]
        parts += [f"rank_multiple={self.multiple}"] if self.multiple > 1 else []
        parts += ["uniform"] if self.uniform else []
        parts += ["nested"] if self.nested else []
        parts += [f"for {self.consumer}"] if self.consumer else []
        return ", ".join(parts)

    @property
    def suffix(self) -> str:
        """The target in the name of a file."""
        if self.noise:
            return "noise"
        if self.rank is not None:
            return f"r{self.rank}"
        if self.size is not None:
            return f"{self.size}B"
        if self.energy is None and self.error is None:
            return "nested"
        return f"energy{self.energy:g}" if self.energy is not None else f"error{self.error:g}"


def parse_size(text: str | int) -> int:
    """Return bytes: ``20MB`` = 20 * 10^6, ``20MiB`` = 20 * 2^20, a bare number is bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgG]?[iI]?[bB]?)\s*", str(text))
    unit = None if found is None else _UNITS.get(found[2].upper())
    if found is None or unit is None:
        raise UsageError("no size", expected="bytes, as in 500000, 20MB (10^6) or 20MiB (2^20)", got=text)
    return int(float(found[1]) * unit)


def _rank(word: int | str | None) -> int | None:
    """Return the rank that a word says: digits are a number, "noise" none."""
    if not isinstance(word, str):
        return word
    if word != "noise" and not (word.isdecimal() and len(word) < 10):
        raise UsageError("no rank", expected="a whole number of at least 1, or noise", got=word)
    return None if word == "noise" else int(word)


def _whole(what: str, count: object) -> None:
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= NO_CAP):
        raise UsageError(f"{what} out of range", expected="an integer of at least 1", got=count)


Choose = Callable[[Array], int]
Edge = Callable[[str], float]


def no_edge(name: str) -> float:
    """Return 0: everything stands above it."""
    return 0.0
