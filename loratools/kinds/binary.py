"""Binary: factors as Binary Adapters store them: one mean, one deviation and median levels per factor."""

from __future__ import annotations

from typing import Self

from loratools.core.routes import route
from loratools.core.update import Array, Leaf, kind, namespace, shape_of
from loratools.errors import FormatError, UsageError
from loratools.kinds.coded import Coded, unpacked
from loratools.kinds.lowrank import LowRank
from loratools.linalg import seeds
from loratools.linalg.bits import pack, row_bytes, unpack
from loratools.linalg.medians import MEDIANS
from loratools.linalg.namespace import cast, down, up

EPS = 1e-5  # added to the deviation before dividing


@kind("binary")
class Binary(Coded):
    """D = scale * b @ a with b (out, r), a (r, in), each entry level[code] * deviation + mean (arXiv:2307.16867).

    ``b``, ``a``: codes uint8, row-major, little end first; ``b_stats``, ``a_stats``: fp32 (mean, deviation). Raises
    :class:`FormatError` where sizes disagree.
    """

    b: Leaf | Array
    a: Leaf | Array
    b_stats: Leaf | Array
    a_stats: Leaf | Array
    bits: int
    rank: int
    shape: tuple[int, ...]
    scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        if self.bits not in MEDIANS or self.rank < 1 or len(self.shape) < 2:
            expected = f"{', '.join(map(str, MEDIANS))} bits, a rank, a matrix"
            raise FormatError("an impossible binary update", expected=expected, got=(self.bits, self.rank, self.shape))
        sizes = [(row_bytes(self.rank * n, self.bits),) for n in self.matrix_shape]
        if [shape_of(self.b), shape_of(self.a)] != sizes or {shape_of(self.b_stats), shape_of(self.a_stats)} != {(2,)}:
            got = (shape_of(self.b), shape_of(self.a))
            raise FormatError("codes of a binary update do not fit its shape", expected=sizes, got=got)

    def unpacked(self, dtype: str = "float32") -> LowRank:
        """Return the factors as leaves that unpack when read."""
        m, n = self.matrix_shape
        b = Leaf((m, self.rank), dtype, lambda out: self._decoded(self.b, self.b_stats, (m, self.rank), dtype))
        a = Leaf((self.rank, n), dtype, lambda out: self._decoded(self.a, self.a_stats, (self.rank, n), dtype))
        return LowRank(b, a, self.scale, self.shape)

    def _decoded(self, codes: Leaf | Array, stats: Leaf | Array, shape: tuple[int, int], dtype: str) -> Array:
        """Return a factor: its few values are rounded before they are looked up."""
        codes, stats = (t.read() if isinstance(t, Leaf) else t for t in (codes, stats))
        each = unpack(codes[None, :], self.bits, shape[0] * shape[1])[0, :]
        value = down(_levels(self.bits, codes) * stats[1] + stats[0], dtype)
        return namespace(codes).take(value, cast(each, "int64")).reshape(shape)

    @classmethod
    def example(cls, seed: int) -> Self:
        """A 5 x 7 update of rank 3 in 2 bits."""
        b = seeds.uniform(seeds.key_of(seed, "binary.b"), 5, 3) - 0.5
        made = binary(LowRank(b, seeds.uniform(seeds.key_of(seed, "binary.a"), 3, 7) - 0.5, 2.0), 2)
        return cls(made.b, made.a, made.b_stats, made.a_stats, 2, 3, (5, 7), 2.0)


def _levels(bits: int, like: Array) -> Array:
    half = MEDIANS[bits]
    xp = namespace(like)
    both = [*(-v for v in reversed(half)), *half]
    return up(xp.asarray(both, dtype=xp.float64, device=getattr(like, "device", None)))


def binary(u: LowRank, bits: int) -> Binary:
    """Return the update quantised after the fact by the paper's own rule: standardise, take the nearest level."""
    if bits not in MEDIANS:
        raise UsageError("Binary Adapters have no such size", expected=", ".join(map(str, MEDIANS)), got=bits)
    (b, b_stats), (a, a_stats) = (_coded(up(t), bits) for t in (u.b, u.a))
    return Binary(b, a, b_stats, a_stats, bits, u.rank, u.shape, u.scale)


def _coded(x: Array, bits: int) -> tuple[Array, Array]:
    """Return packed codes and (mean, unbiased deviation) of a factor."""
    xp = namespace(x)
    wide = up(x, "float64").reshape(-1)
    mean = xp.mean(wide)
    deviation = xp.sqrt(xp.sum((wide - mean) ** 2) / max(wide.shape[0] - 1, 1))
    levels = _levels(bits, x)
    place = xp.searchsorted((levels[1:] + levels[:-1]) / 2, up((wide - mean) / (deviation + EPS)))
    return pack(cast(place, "uint8")[None, :], bits)[0, :], up(xp.stack([mean, deviation]))


route(Binary, LowRank)(unpacked)
