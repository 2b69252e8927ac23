from __future__ import annotations

import subprocess
import sys
import threading

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.errors import MissingExtraError, NumericsError, UsageError
from loratools.leaf import Leaf
from loratools.linalg import namespace as ns

SHORT = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
FLOATS = (*SHORT, "float32", "float64")


def patterns(name: str) -> np.ndarray:
    """Every bit pattern of a short float."""
    dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
    return np.arange(256**dtype.itemsize, dtype=f"u{dtype.itemsize}").view(dtype)


def leaf_of(x: np.ndarray, seen: list | None = None) -> Leaf:
    """A leaf that reads into the scratch buffer, as files do."""

    def load(out):
        if seen is not None:
            seen.append(out)
        raw = np.frombuffer(x.tobytes(), np.uint8)
        if out is None:
            return raw.view(x.dtype).reshape(x.shape)
        out[: raw.size] = raw
        return out[: raw.size].view(x.dtype).reshape(x.shape)

    return Leaf(x.shape, x.dtype.name, load)


# --- up ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("target", ["float32", "float64"])
def test_up_is_exact_on_every_bit_pattern(array, name, target):
    x = patterns(name)
    with np.errstate(invalid="ignore"):
        want = x.astype(np.float64).astype(target)
    got = ns.to_numpy(ns.up(array(x), target))
    assert got.dtype == want.dtype
    nan = np.isnan(want)
    assert np.array_equal(np.isnan(got), nan)
    assert np.array_equal(got[~nan].view("u1"), want[~nan].view("u1"))  # bits, so -0.0 and subnormals count


@pytest.mark.parametrize("special", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_up_keeps_one_special_value_among_finite_ones(name, special):
    x = np.linspace(-3, 3, 1001).astype(getattr(ml_dtypes, name, None) or name)
    x[500] = special
    assert np.array_equal(ns.up(x), x.astype(np.float32), equal_nan=True)


@pytest.mark.parametrize("name", ["int8", "uint8", "int32", "int64", "bool", "float64"])
def test_up_of_other_dtypes_is_the_plain_conversion(array, name):
    x = np.array([[0, 1, 2], [1, 0, 100]]).astype(name)
    assert np.array_equal(ns.to_numpy(ns.up(array(x))), x.astype(np.float32))


@pytest.mark.parametrize("name", FLOATS)
def test_up_of_views_equals_up_of_copies(array, name):
    x = np.random.default_rng(0).standard_normal((6, 10))
    y = array(x, name)
    whole = ns.to_numpy(ns.up(y))
    assert np.array_equal(ns.to_numpy(ns.up(y.T)), whole.T)
    assert np.array_equal(ns.to_numpy(ns.up(y[1:5:2, 3:])), whole[1:5:2, 3:])
    assert ns.to_numpy(ns.up(y[2, 3])) == whole[2, 3]


def test_up_keeps_the_strides_of_a_transposed_view():
    x = np.ones((300, 200), np.float16).T
    assert ns.up(x).flags.f_contiguous
    assert ns.up(x.astype(ml_dtypes.bfloat16)).flags.f_contiguous


def test_up_returns_an_array_of_the_right_dtype_itself(array):
    x = array([1.0, 2.0], "float32")
    assert ns.up(x) is x


def test_up_reads_big_endian():
    assert np.array_equal(ns.up(np.array([1.5, -2.0], ">f2")), np.array([1.5, -2.0], np.float32))


def test_up_refuses_other_targets(array):
    with pytest.raises(UsageError, match="fp32 or fp64"):
        ns.up(array([1.0]), "float16")


@pytest.mark.parametrize("name", FLOATS)
def test_up_of_a_leaf_never_aliases_the_scratch_buffer(name):
    x = np.arange(12.0).reshape(3, 4).astype(getattr(ml_dtypes, name, None) or name)
    first = ns.up(leaf_of(x))
    for target in ("float32", "float64"):
        ns.up(leaf_of(np.zeros_like(x)), target)
    assert np.array_equal(first, x.astype(np.float32))
    assert np.array_equal(ns.up(leaf_of(x).T), x.astype(np.float32).T)


def test_the_scratch_buffer_is_reused_grows_and_belongs_to_one_thread():
    seen: list = []
    small, large = np.ones(10, np.float16), np.ones(100_000, np.float16)
    for x in (large, small, large):
        ns.up(leaf_of(x, seen))
    assert seen[0] is seen[1] is seen[2]
    ns.up(leaf_of(np.ones(seen[0].size, np.float16), seen))
    assert seen[3].nbytes >= 2 * seen[0].nbytes
    other = threading.Thread(target=lambda: ns.up(leaf_of(small, seen)))
    other.start()
    other.join()
    assert seen[4] is not seen[3]


# --- down -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLOATS)
def test_down_rounds_to_nearest_even(array, name):
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.standard_normal(1000), rng.standard_normal(1000) * 1e-4, [0.0, -0.0]]).astype(np.float32)
    want = x.astype(getattr(ml_dtypes, name, None) or name)
    assert bytes(ns.raw_bytes(ns.down(array(x), name))) == want.tobytes()


@pytest.mark.parametrize("name", SHORT)
def test_down_breaks_ties_to_even(array, name):
    grid = patterns(name).astype(np.float32)
    grid = np.unique(grid[np.isfinite(grid) & (grid > 0)])
    middle = (grid[:-1].astype(np.float64) + grid[1:]) / 2
    exact = middle == middle.astype(np.float32)  # bf16 subnormals: their middles are fp32 subnormals, still exact
    got = ns.to_numpy(ns.up(ns.down(array(middle[exact].astype(np.float32)), name)))
    even = np.where(np.arange(len(grid) - 1) % 2 == 1, grid[:-1], grid[1:])  # patterns count up from 1, the odd one
    assert np.array_equal(got, even[exact])


@pytest.mark.parametrize("name", SHORT)
def test_down_after_up_is_the_identity_on_finite_values(array, name):
    x = patterns(name)
    x = x[np.isfinite(x.astype(np.float32))]
    assert bytes(ns.raw_bytes(ns.down(ns.up(array(x)), name))) == x.tobytes()


@pytest.mark.parametrize(
    ("name", "value"),
    [("float16", 65520.0), ("bfloat16", 3.4e38), ("float8_e4m3fn", 464.1), ("float8_e5m2", 61440.0), ("float32", 1e39)],
)
def test_down_raises_on_overflow(array, name, value):
    with pytest.raises(NumericsError, match="too large"):
        ns.down(array([1.0, -value], "float64"), name)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float8_e5m2", "float32", "float8_e4m3fn"])
def test_down_passes_values_that_were_not_finite(array, name):
    got = ns.to_numpy(ns.up(ns.down(array([np.inf, -np.inf, np.nan, 1.0], "float64"), name)))
    want = [np.nan] * 3 + [1.0] if name == "float8_e4m3fn" else [np.inf, -np.inf, np.nan, 1.0]  # it has no infinity
    assert np.array_equal(got, want, equal_nan=True)


def test_down_to_integers_rounds_and_checks_the_range(array):
    assert ns.to_numpy(ns.down(array([0.5, 1.5, -2.5, 127.4], "float32"), "int8")).tolist() == [0, 2, -2, 127]
    for bad in (128.0, -1e9, np.nan):
        with pytest.raises(NumericsError, match="does not fit int8"):
            ns.down(array([bad], "float32"), "int8")


def test_down_refuses_unknown_names(array):
    with pytest.raises(UsageError, match="unknown dtype"):
        ns.down(array([1.0]), "float12")


# --- names, devices, bytes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FLOATS, "int8", "int64", "bool"])
def test_dtype_names_are_shared(array, name):
    x = array([[1, 0, 1]], name)
    assert ns.dtype_name(x) == name
    assert ns.dtype_name(leaf_of(ns.to_numpy(x))) == name
    assert ns.is_float(name) == ("float" in name)
    assert ns.device_of(x) == ns.device_of(leaf_of(ns.to_numpy(x))) == "cpu"


def test_namespace_is_numpy_itself_or_the_torch_wrapper(array):
    x = array([1.0])
    xp = ns.namespace(x, 2.0, None)
    assert xp is np if isinstance(x, np.ndarray) else xp.__name__ == "array_api_compat.torch"
    assert ns.namespace() is np
    assert ns.namespace(np.float32(1), x) is xp


def test_namespace_refuses_two_libraries():
    with pytest.raises(UsageError, match="two libraries"):
        ns.namespace(np.ones(2), torch.ones(2))


@pytest.mark.parametrize("name", [*FLOATS, "int8", "int64", "bool"])
def test_to_numpy_and_raw_bytes_keep_every_bit(array, name):
    x = np.array([[1, 0, 3], [4, 5, 6]]).astype(getattr(ml_dtypes, name, None) or name)
    for y in (array(x), array(x).T, array(x)[:, ::2]):
        assert bytes(ns.raw_bytes(y)) == np.ascontiguousarray(ns.to_numpy(y)).tobytes()
    assert ns.to_numpy(array(x)).dtype == x.dtype
    assert bytes(ns.raw_bytes(leaf_of(x))) == x.tobytes()


def test_raw_bytes_are_little_endian():
    assert bytes(ns.raw_bytes(np.array([1], ">i2"))) == b"\x01\x00"
    assert bytes(ns.raw_bytes(np.float32(1.5))) == np.float32(1.5).tobytes()


@pytest.mark.parametrize("name", [*FLOATS, "int8"])
def test_to_device_turns_numpy_into_torch_only_off_the_cpu(name):
    x = np.array([1, 2, 3]).astype(getattr(ml_dtypes, name, None) or name)
    assert ns.to_device(x, "cpu") is x
    assert ns.dtype_name(ns.to_device(leaf_of(x), "cpu")) == name
    moved = ns.to_device(x, "meta")
    assert ns.device_of(moved) == "meta"
    assert ns.dtype_name(moved) == name
    assert ns.device_of(ns.to_device(torch.ones(2), "cpu")) == "cpu"


def test_to_device_names_the_missing_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match="torch is not installed"):
        ns.to_device(np.ones(2), "cuda")


# --- all_finite -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FLOATS, "float8_e4m3fnuz"])
def test_all_finite_sees_a_single_special_value(array, name):
    x = np.tile(np.linspace(-100, 100, 37), 9)
    assert ns.all_finite(array(x, name))
    assert ns.all_finite(array(x.reshape(9, 37), name).T)
    for bad in (np.nan, np.inf, -np.inf):
        if np.isinf(bad) and name.startswith("float8_e4m3"):
            continue  # these formats have no infinity
        y = x.copy()
        y[77] = bad
        assert not ns.all_finite(array(y, name))


def test_all_finite_is_not_fooled_by_overflowing_sums_and_integers(array):
    assert ns.all_finite(array(np.full(1000, 3e38), "float32"))
    assert ns.all_finite(array([1, 2], "int64"))
    assert ns.all_finite(array(np.zeros(0), "float16"))


# --- small linear algebra and gathering -------------------------------------------------------------------------------


def test_cholesky_gives_the_factor_or_none(array):
    x = np.random.default_rng(0).standard_normal((3, 5, 9))
    gram = x @ x.mT
    factor = ns.to_numpy(ns.cholesky(array(gram)))
    assert np.allclose(
        factor @ factor.mT, gram, rtol=0, atol=50 * 2.2e-16 * np.abs(gram).max()
    )  # 5^2 operations, slack 2
    assert ns.cholesky(array(np.diag([1.0, -1.0]))) is None
    assert ns.cholesky(array(np.zeros((2, 2)))) is None


@pytest.mark.parametrize("size", [1, 7, 300])
@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("transpose", [True, False])
def test_solve_triangular_solves_and_reads_one_triangle(array, size, lower, transpose):
    rng = np.random.default_rng(size)
    full = rng.standard_normal((size, size)) / size + 3 * np.eye(size)  # condition about 2
    y = rng.standard_normal((size, 4))
    triangle = np.tril(full) if lower else np.triu(full)
    x = ns.to_numpy(ns.solve_triangular(array(full), array(y), lower=lower, transpose=transpose))
    # backward stable: residual <= c size eps |L| |x|, |L| < 10
    assert np.abs((triangle.T if transpose else triangle) @ x - y).max() < 20 * size * 2.2e-16 * max(
        1.0, np.abs(x).max()
    )


def test_solve_triangular_is_batched(array):
    rng = np.random.default_rng(0)
    lower, y = np.tril(rng.standard_normal((3, 5, 5))) + 4 * np.eye(5), rng.standard_normal((3, 5, 2))
    x = ns.to_numpy(ns.solve_triangular(array(lower), array(y), lower=True))
    assert np.abs(lower @ x - y).max() < 100 * 2.2e-16 * 10


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-50, 50), min_size=1, max_size=40), st.data())
def test_topk_threshold_is_the_kth_largest_magnitude(array, values, data):
    k = data.draw(st.integers(1, len(values)))
    x = array(np.array(values, np.float32)[None, :])
    threshold = float(ns.topk_threshold(x, k))
    assert threshold == sorted(map(abs, values), reverse=True)[k - 1]
    assert int((abs(x) >= ns.topk_threshold(x, k)).sum()) >= k


@pytest.mark.parametrize("k", [0, 4])
def test_topk_threshold_refuses_k_outside(array, k):
    with pytest.raises(UsageError):
        ns.topk_threshold(array([1.0, 2.0, 3.0]), k)


def test_scatter_add_sums_repeated_indices_in_fp64(array):
    index, values = array([3, 1, 3, 3], "int64"), array([1.0, 2.0, 1e8, -1e8], "float32")
    got = ns.scatter_add(5, index, values)
    assert ns.to_numpy(got).tolist() == [0, 2, 0, 1, 0]  # fp32 sums would lose the 1
    assert ns.dtype_name(got) == "float32"
    assert ns.to_numpy(ns.scatter_add(3, array([], "int64"), array([], "float32"))).tolist() == [0, 0, 0]


@pytest.mark.parametrize("index", [-1, 5])
def test_scatter_add_refuses_indices_outside(array, index):
    with pytest.raises(UsageError, match="outside"):
        ns.scatter_add(5, array([index], "int64"), array([1.0], "float32"))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.data())
def test_unpack_bits_inverts_little_endian_packing(array, bits, data):
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=40))
    packed = sum(v << (bits * i) for i, v in enumerate(values))
    codes = np.frombuffer(packed.to_bytes((bits * len(values) + 7) // 8, "little"), np.uint8)
    got = ns.unpack_bits(array(codes), bits, len(values))
    assert ns.to_numpy(got).tolist() == values
    assert ns.dtype_name(got) == "uint8"


@pytest.mark.parametrize(("bits", "count"), [(0, 1), (9, 1), (4, 3)])
def test_unpack_bits_refuses_what_is_not_there(array, bits, count):
    with pytest.raises(UsageError):
        ns.unpack_bits(array([255], "uint8"), bits, count)


def test_fft_matches_the_sum_and_its_inverse(array):
    x = np.random.default_rng(0).standard_normal((3, 6))
    wave = np.exp(-2j * np.pi * np.outer(np.arange(6), np.arange(6)) / 6)
    assert np.abs(ns.to_numpy(ns.fft(array(x))) - x @ wave).max() < 100 * 2.2e-16
    assert np.abs(ns.to_numpy(ns.ifft(ns.fft(array(x), axis=0), axis=0)) - x).max() < 100 * 2.2e-16


# --- start-up ---------------------------------------------------------------------------------------------------------


def test_the_numpy_path_imports_no_heavy_library():
    program = """
import sys, numpy as np
from loratools.linalg import angles, dense, factored, norms, rsvd, seeds, select
b, a = np.ones((9, 2), np.float16), np.eye(2, 7, dtype=np.float16)
factored.truncate(b, a, lambda s: 1)
rsvd.rsvd(np.ones((9, 7), np.float32), 1, key=seeds.key_of(0, "x"))
heavy = {"torch", "scipy", "array_api_compat", "ml_dtypes", "fbpca"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_all_finite_reads_big_endian():
    assert ns.all_finite(np.linspace(-3, 3, 99).astype(">f2"))
    assert not ns.all_finite(np.array([1.0, np.inf], ">f2"))
