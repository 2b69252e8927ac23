"""``--type fourierft``: the coefficients of a few frequencies."""

from __future__ import annotations

from loratools.core.adapter import Adapter
from loratools.errors import UsageError
from loratools.files import BaseLike
from loratools.formats.peft.types import PEFT_TYPES
from loratools.io.base import Base
from loratools.io.bundle import from_memory
from loratools.kinds.fourier import Fourier
from loratools.leaf import Array, Leaf
from loratools.linalg.namespace import cast, fft, namespace, up
from loratools.ops.types.base import adapter_type
from loratools.ops.types.projected import Type, named, projected, shapes_of

SCALING = 150.0  # PEFT's default; the function does not depend on it


@adapter_type("fourierft")
def to_fourierft(
    adapter: Adapter, base: BaseLike | None = None, *, frequencies: int = 0, location_seed: int = 777
) -> Adapter:
    """FourierFT: the coefficients of ``frequencies`` seeded places of the spectrum of D (0: 1000); torch draws them.

    D = s Re ifft2(S) with a real sparse S is a sum of orthogonal cosines, so that coefficients are read off the
    spectrum of D. Places are PEFT's own, for weights of one shape the same. Lossy; projecting again changes nothing.
    Cost: D is formed, and one FFT.
    """
    adapter = named(adapter)
    least = min((m * n for m, n in shapes_of(adapter).values()), default=1)
    frequencies = frequencies or min(1000, least)
    if not 1 <= frequencies <= least:
        raise UsageError("so many frequencies are none", expected=f"1 to {least}", got=frequencies)
    fields = {
        "n_frequency": frequencies, "n_frequency_pattern": {}, "scaling": SCALING, "random_loc_seed": location_seed,
        "init_weights": True, "ifft2_norm": "backward",
    }  # fmt: skip
    to = Type("FOURIERFT", fields, conv1d=True)
    places: dict[tuple[int, ...], tuple[Array, Array]] = {}

    def project(name: str, d: Array) -> dict[str, Array]:
        if d.shape not in places:
            places[d.shape] = _places(d, to)
        return {"fourierft_spectrum": coefficients(d, *places[d.shape], SCALING)}

    return projected(adapter, base, to, project)


def coefficients(d: Array, rows: Array, columns: Array, scale: float) -> Array:
    """Return the real coefficients (n,) at distinct (rows, columns) with the least |d - scale Re ifft2(S)|_F; fp32.

    Re F of the 2-D DFT F of d over the scale, twice where neither the frequency is its own conjugate (cos^2 has mean
    1/2) nor its conjugate is there, too: those two are one cosine, and share it evenly.
    """
    m, n = d.shape
    f = fft(fft(up(d, "float64"), axis=0), axis=1)
    xp = namespace(f)
    here, there = rows * n + columns, ((-rows) % m) * n + (-columns) % n
    alone = ~_among(there, here)
    value = xp.real(f.reshape(-1)[here])
    return up(xp.where(alone, 2.0, 1.0) * value / scale, "float32")


def _among(values: Array, known: Array) -> Array:
    """Return which of the values are among the known ones."""
    xp = namespace(values)
    ordered = xp.sort(known)
    at = xp.searchsorted(ordered, values)
    return xp.take(ordered, xp.where(at < ordered.shape[0], at, 0)) == values


def _places(d: Array, to: Type) -> tuple[Array, Array]:
    """Return rows and columns as PEFT draws them for this shape: the reader of the type knows."""
    name = "x.weight"
    xp = namespace(d)
    zeros = xp.zeros((to.fields["n_frequency"],), dtype=xp.float32)
    hollow = Base({name: Leaf(tuple(d.shape), "float32", lambda out: out)})
    bundle = from_memory({"base_model.model.x.fourierft_spectrum": zeros}, dict(to.fields))
    found = PEFT_TYPES["FOURIERFT"].decode(bundle, base=hollow)[name]
    assert isinstance(found, Fourier)
    return tuple(cast(t.read() if isinstance(t, Leaf) else t, "int64") for t in (found.rows, found.columns))
