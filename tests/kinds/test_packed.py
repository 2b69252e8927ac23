"""Packed and binary updates: broken ones are refused, decoding is the same bits everywhere."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest

from loratools.errors import FormatError
from loratools.kinds.binary import Binary, binary
from loratools.kinds.lowrank import LowRank
from loratools.kinds.packed import Packed, packed_sizes, runs_of


def golden(runs: tuple[int, ...], m: int, n: int, group: int, book: int) -> Packed:
    """Return an update of codes 0, 1, 2, ... modulo 251, and scales 0.01, 0.02, ..."""
    codes, scales = packed_sizes(runs, m, n, group)
    return Packed(
        (np.arange(codes) % 251).astype(np.uint8), (0.01 * (1 + np.arange(scales))).astype(np.float16), runs, (m, n),
        group, book,
    )  # fmt: skip


def test_decoding_gives_the_same_bits_everywhere() -> None:
    """Hashes of decoded factors, recorded once: a look-up, a product of two fp32 numbers, nothing else."""
    made = [golden((4, 1, 3, 2, 1, 3), 13, 9, 0, 0), golden((8, 1, 5, 1, 1, 2), 21, 10, 8, 1)]
    digest = sha256()
    for u in made:
        low = u.unpacked()
        digest.update(np.ascontiguousarray(low.b.read()).tobytes())
        digest.update(np.ascontiguousarray(low.a.read()).tobytes())
    assert digest.hexdigest() == "0363ab4358b8e1d59a622cec2b4130b4c4c1dc7855aa12e65407a6e415086c8c"


@pytest.mark.parametrize(
    "change",
    [
        {"runs": (1, 2, 3)},
        {"runs": (9, 1)},
        {"runs": (1, 0)},
        {"runs": (1, 99)},
        {"shape": (13,)},
        {"book": 7},
        {"group": 4},
    ],
)
def test_broken_updates_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(FormatError):
        replace(golden((4, 1, 1, 2), 13, 9, 0, 0), **change)  # type: ignore[arg-type]


def test_without_components_it_is_zero() -> None:
    u = Packed(np.zeros(0, np.uint8), np.zeros(0, np.float16), (), (4, 5))
    assert not u.dense().any()
    assert u.unpacked().rank == 1


def test_runs() -> None:
    assert runs_of((8, 4, 4, 1, 1, 1)) == (8, 1, 4, 2, 1, 3)
    assert runs_of(()) == ()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_binary_adapters_follow_the_papers_program(bits: int) -> None:
    """Its QLinear: z = (w - mean) / (std + 1e-5), nearest level, level * std + mean; std is torch's, unbiased."""
    rng = np.random.default_rng(bits)
    low = LowRank(rng.standard_normal((12, 4)).astype(np.float32), rng.standard_normal((4, 10)).astype(np.float32), 3.0)
    from loratools.linalg.medians import MEDIANS

    half = np.array(MEDIANS[bits])
    table = np.concatenate([-half[::-1], half])
    got = binary(low, bits).unpacked()
    for told, w in ((got.b.read(), low.b), (got.a.read(), low.a)):
        mean, std = w.mean(dtype=np.float64), w.std(dtype=np.float64, ddof=1)
        z = (w - mean) / (std + 1e-5)
        want = table[np.abs(z[..., None] - table).argmin(-1)] * std + mean
        assert np.allclose(told, want, atol=1e-5)


def test_an_impossible_binary_update_is_refused() -> None:
    u = Binary.example(0)
    for change in ({"bits": 3}, {"rank": 0}, {"rank": 9}, {"shape": (5,)}):
        with pytest.raises(FormatError):
            replace(u, **change)  # type: ignore[arg-type]
