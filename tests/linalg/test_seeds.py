from __future__ import annotations

from hashlib import blake2b

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.linalg import seeds
from loratools.linalg.namespace import dtype_name, to_numpy

# Published with the Random123 library (kat_vectors, philox4x32 10 rounds): counter, key, words.
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (PI, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]
GOLDEN_KEY = (1028934756, 1133265449)
GOLDEN_WORDS = [[3684021294, 1276201528, 3317086003], [3661235292, 668825494, 2112215538]]


def plain_philox(counter, key):
    """The published algorithm in Python's unbounded integers: the independent witness."""
    x, k = list(counter), list(key)
    for _ in range(10):
        p, q = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [(q >> 32) ^ x[1] ^ k[0], q % 2**32, (p >> 32) ^ x[3] ^ k[1], p % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return tuple(x)


@pytest.mark.parametrize(("counter", "key", "want"), KNOWN)
def test_published_known_answers(array, counter, key, want):
    got = seeds.philox(tuple(array([c], "int64") for c in counter), key)
    assert tuple(int(word[0]) for word in got) == want
    assert plain_philox(counter, key) == want


@settings(max_examples=30, deadline=None)
@given(st.tuples(*[st.integers(0, 2**32 - 1)] * 2), st.integers(0, 2**32 - 40), st.integers(0, 2**32 - 40))
def test_words_equal_plain_integers_everywhere(array, key, row, column):
    got = to_numpy(seeds.words(key, range(row, row + 3), range(column, column + 2), like=array([0.0])))
    want = [[plain_philox((c, r, 0, 0), key)[0] for c in range(column, column + 2)] for r in range(row, row + 3)]
    assert got.tolist() == want


def test_golden_words():
    key = seeds.key_of(7, "model.layers.0.self_attn.q_proj.weight")
    digest = blake2b(b"7:model.layers.0.self_attn.q_proj.weight").digest()
    assert key == (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little"))
    assert key == GOLDEN_KEY
    assert seeds.words(key, 2, 3).tolist() == GOLDEN_WORDS
    assert seeds.signs(key, 2, 3).tolist() == [[-1 if w >> 31 else 1 for w in row] for row in GOLDEN_WORDS]
    assert seeds.uniform(key, 2, 3).tolist() == [[w / 2**32 for w in row] for row in GOLDEN_WORDS]


def test_libraries_agree_bit_for_bit_and_dtypes_are_as_promised(array):
    key, like = seeds.key_of(0, "x"), array([1.0])
    for make, dtype in ((seeds.words, "uint32"), (seeds.signs, "float32"), (seeds.uniform, "float64")):
        got = make(key, 33, 1001, like=like)
        assert dtype_name(got) == dtype
        assert np.array_equal(to_numpy(got), make(key, 33, 1001))


def test_an_entry_does_not_depend_on_the_tile_it_is_asked_in():
    key = seeds.key_of(3, "x")
    whole = seeds.words(key, 700, 90)  # more than one internal tile
    assert np.array_equal(seeds.words(key, range(650, 700), range(80, 90)), whole[650:, 80:])
    assert np.array_equal(seeds.words(key, range(1, 700, 7), 5), whole[1::7, :5])
    assert seeds.words(key, 0, 4).shape == (0, 4)
    assert seeds.words(key, 4, 0).shape == (4, 0)


def test_streams_look_random_and_differ():
    count = 200 * 300
    u = seeds.uniform(seeds.key_of(0, "x"), 200, 300)
    # mean of n uniforms has standard deviation 1 / sqrt(12 n); five of them
    assert abs(u.mean() - 0.5) < 5 / np.sqrt(12 * count)
    assert u.min() >= 0
    assert u.max() < 1
    signs = seeds.signs(seeds.key_of(0, "x"), 200, 300)
    for other in (seeds.key_of(1, "x"), seeds.key_of(0, "y")):
        assert abs((signs * seeds.signs(other, 200, 300)).mean()) < 5 / np.sqrt(count)
    gram = signs.T @ signs / 200  # columns are uncorrelated: entries of variance 1 / 200
    assert np.abs(gram - np.eye(300)).max() < 6 / np.sqrt(200)
