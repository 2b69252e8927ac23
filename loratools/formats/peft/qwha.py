"""``peft_type: QWHA`` (and ``QHFT``, its first name): sparse in a Walsh-Hadamard basis of the inputs.

The fork of PEFT at github.com/vantaa89/qwha. D = scaling / (in sqrt(out)) F H with F (out, in) zero but for
``qwha_spectrum`` (n,) at ``qwha_indices_default`` (2, n), and H the Hadamard matrix of
:mod:`loratools.linalg.walsh`; one side only. The stored places count: an allocator chose them after the seed had drawn
others. The code's own merge leaves H out.
"""

from __future__ import annotations

from math import sqrt
from typing import ClassVar

from loratools.core.lazy import computed
from loratools.core.update import Array
from loratools.errors import FormatError
from loratools.formats.pairs import number
from loratools.formats.peft.tuner import Module, Size, Tuner
from loratools.formats.peft.types import peft_type
from loratools.kinds.dense import Dense
from loratools.linalg.namespace import cast, down, namespace, scatter_add, up, working_dtype
from loratools.linalg.walsh import head, walsh

_LEAVES = ("spectrum", "indices_default", "scaling_default", "n_frequency_default", "random_loc_seed_default")


@peft_type("QWHA")
class Qwha(Tuner):
    """Few coefficients in a Hadamard basis."""

    type = "QWHA"
    prefix: ClassVar[str] = "qwha"
    leaves = tuple(f"qwha_{leaf}" for leaf in _LEAVES)

    def size(self, m: Module) -> Size:
        """Return nothing: the places do not tell the sizes."""
        return None, None

    def weight(self, m: Module) -> Dense:
        """Return the transformed coefficients."""
        spectrum, places = m[f"{self.prefix}_spectrum"], m.index(f"{self.prefix}_indices_default")
        (out, n), count = m.shape, spectrum.shape
        if len(count) != 1 or places.shape != (2, *count):
            raise FormatError(
                "coefficients and places disagree", parameter=m.path, expected=(2, *count), got=places.shape
            )
        head(n)  # a size whose matrix is not known is refused now, not when the update is used
        scale, dtype = number(m[f"{self.prefix}_scaling_default"]) / (n * sqrt(out)), working_dtype(spectrum)

        def transformed() -> Array:
            rows, columns = cast(places.read(), "int64")
            xp = namespace(rows)
            if int(xp.min(places.read())) < 0 or int(xp.max(rows)) >= out or int(xp.max(columns)) >= n:
                raise FormatError("a place out of range", parameter=m.path, expected=(out, n))
            flat = rows * n + columns
            if len(xp.unique_values(flat)) < len(flat):
                raise FormatError("places that repeat", parameter=m.path, expected=f"{len(flat)} different ones")
            return down(walsh(scatter_add(out * n, flat, up(spectrum, "float64")).reshape(out, n)), dtype)

        return Dense(computed((out, n), transformed, dtype), scale)


@peft_type("QHFT")
class Qhft(Qwha):
    """QWHA under the name of its first code."""

    type = "QHFT"
    prefix = "qhft"
    leaves = tuple(f"qhft_{leaf}" for leaf in _LEAVES)
