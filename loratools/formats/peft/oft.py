"""``peft_type: OFT``: W' = W diag(R_1, ..., R_c)^T, rotations of blocks of the inputs (arXiv:2306.07280, 2506.19847).

``oft_R.weight`` (c, s (s - 1) / 2) holds the upper triangles of skew-symmetric Q; one row serves all blocks under
``block_share``. R is Cayley's transform of Q, or under ``use_cayley_neumann`` the truncated series of the *opposite*
rotation: the two are not interchangeable. ``coft`` pulls Q back to a ball of radius ``eps`` / sqrt(c).
"""

from __future__ import annotations

from math import isqrt

from loratools.core.lazy import computed
from loratools.core.update import Array, Leaf, Update, namespace
from loratools.errors import FormatError, MismatchError, UnsupportedError
from loratools.formats.peft.fields import Fields
from loratools.formats.peft.forms.form import Remark
from loratools.formats.peft.tuner import Model, Module, Size, Tuner
from loratools.formats.peft.types import peft_type
from loratools.kinds.block_diagonal import BlockDiagonal
from loratools.kinds.multiplied import Multiplied
from loratools.linalg.cayley import cayley, neumann, projected, skew
from loratools.linalg.namespace import down, up

LEAF, EMBEDDING = "oft_R.weight", "oft_embedding_R.weight"
HALVED = (0, 18)  # the version of PEFT from which the last power of the series enters once


@peft_type("OFT")
class Oft(Tuner):
    """Rotated inputs: of a convolution its patches, of an embedding the vectors."""

    type = "OFT"
    leaves = (LEAF, EMBEDDING, "oft_r")

    def check(self, fields: Fields) -> None:
        """Refuse what is no OFT of today."""
        fields.flag("use_cayley_neumann")

    def size(self, m: Module) -> Size:
        """Return the rotated side, where blocks are not shared."""
        if "oft_r" in m:
            raise UnsupportedError(
                "oft_r is the OFT of PEFT 0.15 and before, another parametrisation that PEFT itself no longer reads",
                parameter=m.path, hint="merge it with that version, and extract the difference",
            )  # fmt: skip
        count, size = _blocks(m)
        width = None if m.fields.flag("block_share") else count * size
        return (width, None) if EMBEDDING in m else (None, width)

    def is_embedding(self, m: Module) -> bool:
        """Return whether vectors of an embedding are rotated."""
        return EMBEDDING in m

    def weight(self, m: Module) -> Update:
        """Return W R^T; of an embedding, whose stored rows are multiplied by R, the logical weight is R^T W."""
        count, size = _blocks(m)
        axis = 0 if EMBEDDING in m else 1
        width = m.matrix_shape[axis]
        if width % size:
            raise MismatchError("the blocks do not fit the base", expected=f"a multiple of {size}", got=width)
        return Multiplied(BlockDiagonal(_turns(m, count, size, width // size)), m.shape, axis)

    def remarks(self, model: Model) -> list[Remark]:
        """Tell where the version of PEFT decides what the tensors mean."""
        if not model.fields.flag("use_cayley_neumann") or _halved(model.fields):
            return []
        return ["use_cayley_neumann of a PEFT before 0.18: read as that version trained it; later ones load it with "
                "another last term of the series, and warn"]  # fmt: skip


def _blocks(m: Module) -> tuple[int, int]:
    """Return (rows of the file, size of a block)."""
    shape = m[EMBEDDING if EMBEDDING in m else LEAF].shape
    size = (1 + isqrt(1 + 8 * shape[-1])) // 2
    if len(shape) != 2 or size * (size - 1) // 2 != shape[1]:
        raise FormatError("these are no upper triangles", parameter=m.path, expected="(blocks, s (s - 1) / 2)",
                          got=shape)  # fmt: skip
    if m.fields.flag("block_share") and shape[0] != 1:
        raise FormatError("shared blocks are stored once", parameter=m.path, expected=1, got=shape[0])
    return shape[0], size


def _turns(m: Module, count: int, size: int, wanted: int) -> Leaf:
    """Return R^T - 1 of every block; computed in fp64 when it is read."""
    stored, fields = m[EMBEDDING if EMBEDDING in m else LEAF], m.fields
    series, terms = fields.flag("use_cayley_neumann"), fields.integer("num_cayley_neumann_terms", 5)
    radius = fields.number("eps", 6e-5) if fields.flag("coft") else None
    halved = _halved(fields)
    if count not in (1, wanted):
        raise MismatchError("the blocks do not fit the base", parameter=m.path, expected=wanted, got=count)

    def compute() -> Array:
        q = skew(up(stored, "float64"), size)
        q = q if radius is None else projected(q, radius)
        turn = neumann(q, terms, halved=halved) if series else cayley(q)
        xp = namespace(turn)
        return down(xp.broadcast_to(xp.matrix_transpose(turn), (wanted, size, size)), "float32")

    return computed((wanted, size, size), compute)


def _halved(fields: Fields) -> bool:
    """True for PEFT 0.18 and later, which writes its version into the config."""
    said = fields.text("peft_version", "0.0").partition("@")[0].split(".")
    return tuple(int(part) if part.isdecimal() else 0 for part in said[:2]) >= HALVED
