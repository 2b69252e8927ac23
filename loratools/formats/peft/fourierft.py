"""``peft_type: FOURIERFT``: D = s Re ifft2(S), S sparse (arXiv:2405.03003, PEFT's ``FourierFTConfig``).

The n places of S are the first of a permutation seeded with ``random_loc_seed``, the same for all weights of one shape.
"""

from __future__ import annotations

from loratools.formats.peft.places import drawn_places
from loratools.formats.peft.tuner import Module, Size, Tuner
from loratools.formats.peft.types import peft_type
from loratools.kinds.fourier import Fourier


@peft_type("FOURIERFT")
class FourierFt(Tuner):
    """A few frequencies of the update; rank at most 2 n."""

    type = "FOURIERFT"
    leaves = ("fourierft_spectrum",)

    def size(self, m: Module) -> Size:
        """Return nothing: the file holds coefficients only."""
        return None, None

    def weight(self, m: Module) -> Fourier:
        """Return the sparse spectrum."""
        spectrum = m["fourierft_spectrum"]
        rows, columns = drawn_places(m, spectrum.shape[0])
        return Fourier(spectrum, rows, columns, m.shape, m.fields.number("scaling"))
