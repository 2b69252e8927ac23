"""The levels of low-bit codes: literal numbers, so that every machine decodes to the same bits.

``GAUSS``: the quantisers of least mean squared error for a unit Gaussian (Lloyd 1957/1982, Max 1960); positive halves,
the rest by symmetry. Squared error 0.363, 0.117, 0.0345, 0.00950, 0.00250, 6.4e-4, 1.6e-4, 4.1e-5 for 1 to 8 bits.
"""

from __future__ import annotations

from loratools.leaf import Array
from loratools.linalg.namespace import cast, namespace, up

BITS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)
GAUSS_BOOK, EVEN_BOOK = 0, 1
DISTORTION = {
    1: 0.36338, 2: 0.11748, 3: 0.034548, 4: 0.009501, 5: 0.0025047, 6: 6.4423e-4, 7: 1.6347e-4, 8: 4.1172e-5,
    9: 2.2e-5, 10: 5.6e-6, 11: 1.4e-6, 12: 3.5e-7,
}  # fmt: skip
"""Mean squared error for a unit Gaussian, by bits; above 8 of even levels that reach 4.2 deviations."""

GAUSS: dict[int, tuple[float, ...]] = {
    1: (1.0,),  # a sign: its size is the scale's business
    2: (
        0.45278,
        1.51042,
    ),
    3: (
        0.24509,
        0.75601,
        1.34391,
        2.15195,
    ),
    4: (
        0.12840,
        0.38805,
        0.65676,
        0.94234,
        1.25623,
        1.61805,
        2.06902,
        2.73259,
    ),
    5: (
        0.06589,
        0.19805,
        0.33138,
        0.46670,
        0.60493,
        0.74714,
        0.89457,
        1.04878,
        1.21181,
        1.38634,
        1.57623,
        1.78723,
        2.02873,
        2.31774,
        2.69112,
        3.26073,
    ),
    6: (
        0.03341,
        0.10028,
        0.16730,
        0.23457,
        0.30219,
        0.37028,
        0.43895,
        0.50832,
        0.57851,
        0.64966,
        0.72192,
        0.79547,
        0.87048,
        0.94716,
        1.02574,
        1.10649,
        1.18972,
        1.27580,
        1.36515,
        1.45828,
        1.55584,
        1.65859,
        1.76755,
        1.88398,
        2.00962,
        2.14681,
        2.29899,
        2.47131,
        2.67228,
        2.91741,
        3.24044,
        3.74410,
    ),
    7: (
        0.01683,
        0.05049,
        0.08417,
        0.11789,
        0.15165,
        0.18546,
        0.21935,
        0.25332,
        0.28739,
        0.32157,
        0.35588,
        0.39033,
        0.42493,
        0.45970,
        0.49466,
        0.52982,
        0.56520,
        0.60082,
        0.63669,
        0.67284,
        0.70929,
        0.74605,
        0.78315,
        0.82062,
        0.85847,
        0.89673,
        0.93544,
        0.97462,
        1.01431,
        1.05454,
        1.09534,
        1.13676,
        1.17884,
        1.22163,
        1.26518,
        1.30954,
        1.35478,
        1.40096,
        1.44817,
        1.49647,
        1.54596,
        1.59675,
        1.64895,
        1.70269,
        1.75813,
        1.81542,
        1.87478,
        1.93642,
        2.00062,
        2.06769,
        2.13801,
        2.21204,
        2.29036,
        2.37365,
        2.46283,
        2.55906,
        2.66390,
        2.77953,
        2.90906,
        3.05726,
        3.23195,
        3.44744,
        3.73495,
        4.18971,
    ),
    8: (
        0.00845,
        0.02534,
        0.04224,
        0.05914,
        0.07605,
        0.09296,
        0.10988,
        0.12681,
        0.14376,
        0.16072,
        0.17769,
        0.19468,
        0.21169,
        0.22872,
        0.24578,
        0.26285,
        0.27996,
        0.29709,
        0.31424,
        0.33143,
        0.34866,
        0.36591,
        0.38321,
        0.40054,
        0.41791,
        0.43532,
        0.45278,
        0.47028,
        0.48784,
        0.50544,
        0.52309,
        0.54080,
        0.55857,
        0.57639,
        0.59428,
        0.61223,
        0.63024,
        0.64833,
        0.66648,
        0.68471,
        0.70301,
        0.72140,
        0.73986,
        0.75841,
        0.77705,
        0.79578,
        0.81460,
        0.83351,
        0.85253,
        0.87165,
        0.89088,
        0.91021,
        0.92967,
        0.94924,
        0.96893,
        0.98874,
        1.00869,
        1.02878,
        1.04900,
        1.06936,
        1.08988,
        1.11055,
        1.13137,
        1.15237,
        1.17353,
        1.19487,
        1.21639,
        1.23810,
        1.26001,
        1.28212,
        1.30445,
        1.32699,
        1.34976,
        1.37276,
        1.39601,
        1.41951,
        1.44328,
        1.46732,
        1.49165,
        1.51628,
        1.54122,
        1.56648,
        1.59207,
        1.61802,
        1.64434,
        1.67105,
        1.69815,
        1.72568,
        1.75366,
        1.78209,
        1.81102,
        1.84046,
        1.87044,
        1.90099,
        1.93215,
        1.96394,
        1.99641,
        2.02960,
        2.06355,
        2.09831,
        2.13394,
        2.17049,
        2.20804,
        2.24665,
        2.28642,
        2.32743,
        2.36978,
        2.41360,
        2.45902,
        2.50620,
        2.55532,
        2.60658,
        2.66023,
        2.71657,
        2.77593,
        2.83874,
        2.90553,
        2.97694,
        3.05380,
        3.13719,
        3.22855,
        3.32990,
        3.44412,
        3.57564,
        3.73171,
        3.92568,
        4.18664,
        4.60358,
    ),
}


def is_even(bits: int, book: int) -> bool:
    """True where the levels are evenly spaced: those of that book, and all above 8 bits."""
    return bits > 8 or (book == EVEN_BOOK and bits > 1)


def levels(bits: int, book: int, like: Array) -> Array:
    """Return the 2^bits levels, ascending, fp32: level c is what code c stands for, before its scale."""
    half = tuple(i + 0.5 for i in range(1 << (bits - 1))) if is_even(bits, book) else GAUSS[bits]
    xp = namespace(like)
    return up(
        xp.asarray([*(-v for v in reversed(half)), *half], dtype=xp.float64, device=getattr(like, "device", None))
    )


def nearest(x: Array, bits: int, book: int) -> Array:
    """Return the code (uint8; int32 above 8 bits) of the level nearest to every entry of x / scale (fp32)."""
    xp = namespace(x)
    if bits == 1:
        return cast(x >= 0, "uint8")
    if is_even(bits, book):
        top = (1 << bits) - 1
        return cast(xp.clip(xp.floor(x) + (1 << (bits - 1)), 0, top), "uint8" if bits <= 8 else "int32")
    table = levels(bits, book, x)
    return cast(xp.searchsorted((table[1:] + table[:-1]) / 2, x), "uint8")


def decoded(codes: Array, bits: int, book: int) -> Array:
    """Return the level (fp32) of every code."""
    xp = namespace(codes)
    table = levels(bits, book, codes)
    return xp.take(table, cast(codes.reshape(-1), "int64")).reshape(codes.shape)


def snapped(x: Array, bits: int, book: int) -> Array:
    """Return the level nearest to every entry of x: what :func:`decoded` makes of :func:`nearest`, in fewer passes."""
    xp = namespace(x)
    if bits == 1:
        return xp.copysign(xp.ones_like(x), x)
    if is_even(bits, book):
        top = (1 << (bits - 1)) - 0.5
        return xp.clip(xp.floor(x) + 0.5, -top, top)
    if bits > 2:
        return decoded(nearest(x, bits, book), bits, book)
    inner, outer = GAUSS[2]
    return xp.copysign(xp.where(xp.abs(x) > (inner + outer) / 2, xp.full_like(x, outer), xp.full_like(x, inner)), x)
