"""``peft_type: WAVEFT``: D = s times the inverse wavelet transform of a sparse S (arXiv:2505.12532, ``WaveFTConfig``).

The places are drawn as FourierFT's, then moved into a frame that is wider by the filter's borders. Its four quarters
are approximation, and detail along rows (top right), columns (bottom left) and both. With ``use_idwt=False`` S is the
update.
"""

from __future__ import annotations

from loratools.core.lazy import computed
from loratools.core.update import Leaf
from loratools.errors import UnsupportedError
from loratools.formats.peft.places import drawn_places
from loratools.formats.peft.tuner import Module, Size, Tuner
from loratools.formats.peft.types import peft_type
from loratools.kinds.sparse import Sparse
from loratools.kinds.wavelet import Wavelet
from loratools.leaf import Array
from loratools.linalg import wavelets
from loratools.linalg.namespace import cast, namespace, scatter_add, up

_SAME = {"sym2": "db2", "sym3": "db3"}


@peft_type("WAVEFT")
class WaveFt(Tuner):
    """A few wavelet coefficients of the update; rank at most n."""

    type = "WAVEFT"
    leaves = ("waveft_spectrum",)

    def size(self, m: Module) -> Size:
        """Return nothing: the file holds coefficients only."""
        return None, None

    def weight(self, m: Module) -> Wavelet | Sparse:
        """Return the sparse coefficients."""
        spectrum, scale = m["waveft_spectrum"], m.fields.number("scaling")
        rows, columns = drawn_places(m, spectrum.shape[0])
        if not m.fields.flag("use_idwt", True):
            return _plain(spectrum, rows, columns, m.shape, scale)
        family = m.fields.text("wavelet_family", "db1").lower()
        taps = wavelets.LOW_PASS.get(_SAME.get(family, family))
        if taps is None:
            expected, got = ", ".join([*wavelets.LOW_PASS, *_SAME]), family
            raise UnsupportedError(
                "a wavelet whose filter PEFT does not define, or not rightly", expected=expected, got=got
            )
        frame = tuple(wavelets.count(size, taps) for size in m.shape)
        shifts = [(wide - size) // 2 for wide, size in zip(frame, m.shape, strict=True)]
        halves = [wide // 2 for wide in frame]

        def moved(axis: int) -> Array:
            """Return the places along one axis: top right is high along rows, so two quarters change places."""
            p, q = (leaf.read() + shift for leaf, shift in zip((rows, columns), shifts, strict=True))
            swapped = (p >= halves[0]) != (q >= halves[1])
            own, half = (p, halves[0]) if axis == 0 else (q, halves[1])
            xp = namespace(own)
            return xp.where(swapped, xp.where(own >= half, own - half, own + half), own)

        size = spectrum.shape
        p, q = computed(size, lambda: moved(0), "int64"), computed(size, lambda: moved(1), "int64")
        return Wavelet(spectrum, p, q, m.shape, scale, taps)


def _plain(values: Leaf, rows: Leaf, columns: Leaf, shape: tuple[int, ...], scale: float) -> Sparse:
    """Return the entries in the order of rows; read when used."""
    m, n = shape

    def order() -> Array:
        flat = rows.read() * n + columns.read()
        return namespace(flat).argsort(flat)

    def starts() -> Array:
        read = rows.read()
        xp = namespace(read)
        counts = scatter_add(m, read, xp.ones(read.shape, dtype=xp.float64))
        return cast(xp.cumulative_sum(counts, include_initial=True), "int64")

    def taken(leaf: Leaf) -> Array:
        x = leaf.read() if leaf is columns else up(leaf)
        return namespace(x).take(x, order())

    return Sparse(
        computed((m + 1,), starts, "int64"),
        computed(columns.shape, lambda: taken(columns), "int64"),
        computed(values.shape, lambda: taken(values), "float64" if values.dtype == "float64" else "float32"),
        shape,
        scale,
    )
