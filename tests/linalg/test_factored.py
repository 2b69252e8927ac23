from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse.linalg
from fbpca import pca
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.dispatch import table
from loratools.errors import NumericsError, UsageError
from loratools.leaf import Leaf
from loratools.linalg import cores, factored, gram, select
from loratools.linalg.namespace import dtype_name, to_numpy, up

EXCESS = 1e-6  # the guarantee: Frobenius error beyond the optimum, relative to the norm of the product
BALANCE = 1e-3  # the guarantee: B'^T B' and A' A'^T equal diag(s) up to this share
FP32 = 6e-8


def fixed(k):
    return lambda s: k


def orth(rng, m, r):
    return np.linalg.qr(rng.standard_normal((m, r)))[0]


def steep(r, condition):
    return np.logspace(0, -np.log10(condition), r)


def product(name: str, m: int, n: int, r: int, condition: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Factors with a difficulty, in fp32."""
    rng = np.random.default_rng(seed)
    u, v = (orth(rng, d, r) if d >= r else rng.standard_normal((d, r)) for d in (m, n))
    s, g, h = steep(r, condition), orth(rng, r, r), orth(rng, r, r)
    b, a = {
        "flat a, steep b": lambda: (u * s @ g, g.T @ v.T),
        "flat b, steep a": lambda: (u @ g, g.T @ (v * s).T),
        "both steep": lambda: (u * s @ g, h @ (v * s).T),
        "cancelling": lambda: (u * s @ g, g.T @ (v * s[::-1]).T),
        "bad gauge": lambda: (u @ g * s @ h, h.T / s[:, None] @ g.T @ v.T),
        "rank deficient": lambda: (u @ g, orth(rng, r, max(1, r // 3)) @ rng.standard_normal((max(1, r // 3), n))),
        "repeated rows": lambda: (u, np.repeat(v.T[: (r + 1) // 2], 2, axis=0)[:r]),
        "dead channels": lambda: (u * (np.arange(r) % 2 == 0), v.T * (np.arange(r) % 2 == 0)[:, None]),
        "half trained": lambda: (u * (np.arange(r) % 2 == 0), v.T),
        "uneven channels": lambda: (u * s @ np.diag(1 / s[::-1]), np.diag(s[::-1]) @ v.T),
    }[name]()
    return b.astype(np.float32), a.astype(np.float32)


DIFFICULTIES = ["flat a, steep b", "flat b, steep a", "both steep", "cancelling", "bad gauge", "rank deficient",
                "repeated rows", "dead channels", "half trained", "uneven channels"]  # fmt: skip


def judge(b, a, scale, result):
    """Return excess error, spectrum and the dense cut, by the SVD of the dense product in fp64."""
    dense = scale * to_numpy(up(b, "float64")) @ to_numpy(up(a, "float64"))
    s = np.linalg.svd(dense, compute_uv=False)
    cut = to_numpy(up(result.b, "float64")) @ to_numpy(up(result.a, "float64"))
    norm = np.linalg.norm(s) or 1.0
    return (
        (np.linalg.norm(dense - cut) - np.linalg.norm(s[result.rank :])) / norm,
        s[: len(result.singular_values)],
        cut,
    )


def check(b, a, scale, result):
    """Check everything that a truncation promises."""
    excess, s, _ = judge(b, a, scale, result)
    assert excess <= EXCESS
    got, k = to_numpy(result.singular_values), result.rank
    assert got.dtype == np.float64
    assert got.shape == (min(*b.shape, a.shape[1]),)
    assert (np.diff(got) <= 0).all()
    norm = np.linalg.norm(s) or 1.0
    assert abs(result.error - np.linalg.norm(s[k:]) / norm) <= 1e-4
    assert result.energy == pytest.approx(1 - result.error**2, abs=1e-12)
    wide, tall = to_numpy(up(result.a, "float64")), to_numpy(up(result.b, "float64"))
    alive = got[:k] > 1e-7 * got[0]
    root = np.where(alive, np.sqrt(np.where(alive, got[:k], 1)), 1)
    assert np.abs((tall / root).T @ (tall / root) - np.diag(alive)).max() <= BALANCE
    assert np.abs((wide / root[:, None]) @ (wide / root[:, None]).T - np.eye(k)).max() <= BALANCE


# --- three witnesses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_truncation_equals_the_dense_svd_in_fp64(array, scale):
    rng = np.random.default_rng(0)
    b, a = rng.standard_normal((76, 48)).astype(np.float32), rng.standard_normal((48, 51)).astype(np.float32)
    result = factored.truncate(array(b), array(a), fixed(12), scale=scale)
    u, s, vh = np.linalg.svd(scale * b.astype(float) @ a)
    _, _, cut = judge(b, a, scale, result)
    # vectors turn by (error of the product) / (gap of the spectrum): about 50 eps s_1 / gap
    gap = s[11] - s[12]
    assert np.linalg.norm(cut - (u[:, :12] * s[:12]) @ vh[:12]) <= 100 * FP32 * s[0] / gap * s[0]
    check(b, a, scale, result)


def test_truncation_is_as_good_as_fbpca_and_arpack(array):
    b, a = product("both steep", 80, 70, 16, 100)
    result = factored.truncate(array(b), array(a), fixed(4))
    dense = b.astype(float) @ a
    _, _, cut = judge(b, a, 1.0, result)
    error = np.linalg.norm(dense - cut)
    u, s, vh = pca(dense, k=4, raw=True, n_iter=6, l=20)
    assert error <= np.linalg.norm(dense - u * s @ vh) + EXCESS * np.linalg.norm(dense)
    others = scipy.sparse.linalg.svds(dense, k=4, return_singular_vectors=False)[::-1]
    assert (
        np.abs(to_numpy(result.singular_values)[:4] - others).max() <= 1e-5 * others[0]
    )  # noise 2e-7 / (2 (s_4/s_1)^2)


def test_closed_form(array):
    """b = [e1 e2 e3] diag(4, 1, 2), a = [f1 f2 f3]^T / 2: singular values 2, 1, 1/2 and factors of unit vectors."""
    b = np.zeros((6, 3))
    b[[0, 1, 2], [0, 1, 2]] = [4, 1, 2]
    a = np.eye(3, 5) / 2
    result = factored.truncate(array(b, "float32"), array(a, "float32"), fixed(2))
    assert np.abs(to_numpy(result.singular_values) - [2, 1, 0.5]).max() < 4 * FP32
    want = np.zeros((6, 5))
    want[0, 0], want[2, 2] = 2, 1
    assert np.abs(to_numpy(result.b) @ to_numpy(result.a) - want).max() < 10 * FP32
    assert np.abs(np.abs(to_numpy(result.b)).max(axis=0) - np.sqrt([2, 1])).max() < 10 * FP32
    assert (result.rank, result.route) == (2, "gram32")
    assert result.error == pytest.approx(np.sqrt(0.25 / 5.25), rel=1e-6)
    assert result.energy == pytest.approx(5 / 5.25, rel=1e-6)


# --- every difficulty -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("condition", [10, 1e3, 1e6])
@pytest.mark.parametrize("name", DIFFICULTIES)
def test_promises_hold_for_difficult_factors(array, name, condition):
    for m, n, r in ((60, 50, 16), (9, 40, 12)):
        b, a = product(name, m, n, r, condition)
        for k in (1, 4, r):
            check(b, a, -0.7, factored.truncate(array(b), array(a), fixed(k), scale=-0.7))
            check(b, a, -0.7, factored.truncate_qr(array(b), array(a), fixed(k), scale=-0.7))


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("magnitudes", [(1e-20, 1e-20), (1e15, 1e15), (1e-18, 1e18), (1e20, 1.0)])
def test_magnitudes_do_not_matter(array, magnitudes):
    for name in DIFFICULTIES:
        b, a = product(name, 30, 40, 8, 1e3)
        b, a = b * np.float32(magnitudes[0]), a * np.float32(magnitudes[1])
        check(b, a, 0.5, factored.truncate(array(b), array(a), fixed(3), scale=0.5))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 23),
    st.integers(1, 23),
    st.integers(1, 30),
    st.sampled_from(["bfloat16", "float16", "float32", "float64", "float8_e4m3fn"]),
    st.data(),
)
def test_promises_hold_for_all_shapes_and_dtypes(array, m, n, r, dtype, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    b, a = array(rng.standard_normal((m, r)), dtype), array(rng.standard_normal((r, n)), dtype)
    k, scale = data.draw(st.integers(1, 40)), data.draw(st.sampled_from([1.0, -2.0, 1e-3]))
    result = factored.truncate(b, a, fixed(k), scale=scale)
    assert result.rank == min(k, m, n, r)
    assert dtype_name(result.b) == dtype_name(result.a) == ("float64" if dtype == "float64" else "float32")
    check(b, a, scale, result)


def test_mixed_dtypes_give_the_wider_one(array):
    b, a = array(np.ones((4, 2)), "float16"), array(np.ones((2, 5)), "float64")
    assert dtype_name(factored.truncate(b, a, fixed(1)).b) == "float64"
    assert factored.truncate(b, a, fixed(1)).route == "gram64"


def test_leaves_are_read(array):
    rng = np.random.default_rng(0)
    b, a = rng.standard_normal((20, 4)).astype(np.float16), rng.standard_normal((4, 30)).astype(np.float16)
    lazy = [Leaf(x.shape, "float16", lambda out, x=x: array(x)) for x in (b, a)]
    got, want = factored.truncate(*lazy, fixed(2)), factored.truncate(array(b), array(a), fixed(2))
    assert np.array_equal(to_numpy(got.b), to_numpy(want.b))
    flipped = factored.truncate(lazy[1].T, lazy[0].T, fixed(2))
    assert flipped.b.shape == (30, 2)


# --- why there are three routes ---------------------------------------------------------------------------------------


def test_flat_a_and_steep_b_need_the_redo_rule(array):
    """fp32 Gram matrices alone miss the guarantee there; the rule notices, and the redone result keeps it."""
    b, a = product("flat a, steep b", 300, 200, 32, 1e5)
    found = cores.spectra([(array(b), array(a))], [1.0], gram.FP32)
    tall, wide = cores.balanced(found, 0, 24)
    short = factored.Truncation(
        up(b @ to_numpy(tall).astype("f4")), to_numpy(wide).astype("f4") @ a, found.s, 24, 0, 0, ""
    )
    assert judge(b, a, 1.0, short)[0] > EXCESS
    assert cores.trusted(found.s, found.noise, [24], [fixed(24)]) == [False]
    result = factored.truncate(array(b), array(a), fixed(24))
    assert result.route == "gram64"
    assert judge(b, a, 1.0, result)[0] <= EXCESS


@pytest.mark.parametrize(
    ("name", "condition", "k", "route"),
    [
        ("flat a, steep b", 10, 4, "gram32"),
        ("flat a, steep b", 1e4, 12, "gram64"),
        ("flat a, steep b", 1e9, 16, "qr"),
        ("rank deficient", 1, 3, "gram32"),
        ("rank deficient", 1, 5, "gram64"),  # nothing is cut: the error to report is all noise in fp32
        ("rank deficient", 1, 16, "qr"),
    ],
)
def test_each_route_is_taken_where_it_suffices(array, name, condition, k, route):
    b, a = product(name, 60, 50, 16, condition)
    result = factored.truncate(array(b), array(a), fixed(k))
    assert result.route == route
    check(b, a, 1.0, result)


def test_a_choice_on_the_edge_is_decided_in_higher_precision(array):
    b, a = product("both steep", 60, 50, 16, 30)
    s = np.linalg.svd(b.astype(float) @ a, compute_uv=False)
    share = np.sum(s[:5] ** 2) / np.sum(s**2)
    for distance, route in ((1e-3, "gram32"), (1e-9, "gram64")):
        for energy, rank in ((share - distance, 5), (share + distance, 6)):
            result = factored.truncate(array(b), array(a), lambda s, energy=energy: select.rank_for_energy(s, energy))
            assert (result.rank, result.route) == (rank, route)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999, 1.0])
def test_energy_is_kept_as_asked(array, energy):
    b, a = product("both steep", 60, 50, 16, 30)
    result = factored.truncate(array(b), array(a), lambda s: select.rank_for_energy(s, energy))
    s = np.linalg.svd(b.astype(float) @ a, compute_uv=False)[:16]
    assert result.rank == select.rank_for_energy(s, energy)
    check(b, a, 1.0, result)


# --- invariances, limits, degenerate cases ----------------------------------------------------------------------------


def test_full_rank_reproduces_the_product(array):
    rng = np.random.default_rng(0)
    b, a = rng.standard_normal((76, 12)).astype(np.float32), rng.standard_normal((12, 51)).astype(np.float32)
    result = factored.truncate(array(b), array(a), fixed(12), scale=3.0)
    dense = 3.0 * b.astype(float) @ a
    assert np.linalg.norm(judge(b, a, 3.0, result)[2] - dense) <= EXCESS * np.linalg.norm(dense)
    assert result.error == 0.0


def test_the_order_of_channels_changes_nothing(array):
    b, a = product("both steep", 60, 50, 16, 30)
    order = np.random.default_rng(0).permutation(16)
    cuts = [
        judge(x, y, 1.0, factored.truncate(array(x), array(y), fixed(5)))[2]
        for x, y in ((b, a), (b[:, order], a[order]))
    ]
    assert np.linalg.norm(cuts[0] - cuts[1]) <= 1e-5 * np.linalg.norm(cuts[0])  # rounding / gap of the spectrum


def test_the_same_call_gives_the_same_bits(array):
    b, a = product("both steep", 60, 50, 16, 30)
    first, second = (factored.truncate(array(b), array(a), fixed(5)) for _ in range(2))
    assert np.array_equal(to_numpy(first.b), to_numpy(second.b))
    assert np.array_equal(to_numpy(first.a), to_numpy(second.a))


def test_inputs_stay_as_they_are(array):
    b, a = product("both steep", 60, 50, 16, 30)
    mine = array(b.copy()), array(a.copy())
    factored.truncate(*mine, fixed(5), scale=-2.0)
    assert np.array_equal(to_numpy(mine[0]), b)
    assert np.array_equal(to_numpy(mine[1]), a)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("zero", ["b", "a", "both", "scale"])
def test_a_zero_product_is_a_valid_result(array, zero):
    rng = np.random.default_rng(0)
    b = rng.standard_normal((9, 6)) * (zero not in ("b", "both"))
    a = rng.standard_normal((6, 7)) * (zero not in ("a", "both"))
    scale = 0.0 if zero == "scale" else 1.0
    for cut in (factored.truncate, factored.truncate_qr):
        result = cut(array(b, "float32"), array(a, "float32"), fixed(4), scale=scale)
        assert (result.rank, result.energy, result.error) == (4, 1.0, 0.0)
        assert not to_numpy(result.singular_values).any()
        check(b, a, scale, result)
    assert not to_numpy(factored.singular_values(array(b), array(a), scale=scale)).any()
    assert factored.frobenius(array(b), array(a), scale=scale) == 0.0


def test_dead_directions_stay_trainable(array):
    """Asked for more than the numerical rank: zero columns in B', orthonormal unit rows in A'."""
    b, a = product("rank deficient", 60, 50, 16, 1)
    result = factored.truncate(array(b), array(a), fixed(9))
    assert result.rank == 9
    assert not to_numpy(result.b)[:, 5:].any()
    rows = to_numpy(up(result.a, "float64"))
    assert np.abs(rows[5:] @ rows[5:].T - np.eye(4)).max() < 20 * FP32
    check(b, a, 1.0, result)


def test_a_product_of_rank_one_with_one_channel(array):
    b, a = np.array([[3.0], [4.0]], np.float32), np.array([[0.0, 2.0]], np.float32)
    result = factored.truncate(array(b), array(a), fixed(1))
    assert float(result.singular_values[0]) == pytest.approx(10, rel=4 * FP32)
    check(b, a, 1.0, result)


@pytest.mark.parametrize("shapes", [((3, 0), (0, 4)), ((3, 2), (3, 4)), ((3,), (3, 4)), ((0, 2), (2, 4))])
def test_shapes_that_do_not_fit_are_refused(array, shapes):
    b, a = (array(np.ones(shape)) for shape in shapes)
    for call in (
        lambda: factored.truncate(b, a, fixed(1)),
        lambda: factored.truncate_qr(b, a, fixed(1)),
        lambda: factored.svd(b, a),
        lambda: factored.inner(b, a, b, a),
    ):
        with pytest.raises(UsageError, match="do not fit"):
            call()


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_values_that_are_not_finite_are_refused(array, bad, dtype):
    good, broken = np.ones((5, 2)), np.ones((5, 2))
    broken[3, 1] = bad
    for x, y in ((broken, good.T), (good, broken.T), (np.zeros((5, 2)), broken.T)):
        for cut in (factored.truncate, factored.truncate_qr):
            with pytest.raises(NumericsError, match="not finite"):
                cut(array(x, dtype), array(y, dtype), fixed(1))
        for call in (factored.frobenius, factored.svd, factored.singular_values):
            with pytest.raises(NumericsError, match="not finite"):
                call(array(x, dtype), array(y, dtype))
        with pytest.raises(NumericsError, match="not finite"):
            factored.inner(array(x, dtype), array(y, dtype), array(good, dtype), array(good.T, dtype))
    with pytest.raises(NumericsError, match="scale is not finite"):
        factored.truncate(array(good), array(good.T), fixed(1), scale=bad)


def test_a_rank_below_one_is_refused(array):
    with pytest.raises(UsageError, match="rank must be positive"):
        factored.truncate(array(np.ones((5, 2))), array(np.ones((2, 5))), fixed(0))


# --- many -------------------------------------------------------------------------------------------------------------


def test_truncate_many_is_a_loop_that_kernels_may_replace(array):
    pairs = [product("both steep", m, 20, r, 10) for m, r in ((9, 4), (30, 6))]
    pairs = [(array(b), array(a)) for b, a in pairs]
    many = factored.truncate_many(pairs, [1.0, -2.0], [fixed(2), fixed(3)])
    for got, (b, a), scale, k in zip(many, pairs, (1.0, -2.0), (2, 3), strict=True):
        want = factored.truncate(b, a, fixed(k), scale=scale)
        assert np.array_equal(to_numpy(got.b), to_numpy(want.b))
        assert got.rank == k
    with pytest.raises(ValueError, match="shorter"):
        factored.truncate_many(pairs, [1.0], [fixed(2)] * 2)
    assert "loratools.linalg.factored.truncate_many" in table()


# --- the other functions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIFFICULTIES)
def test_svd_and_singular_values_equal_the_dense_ones(array, name):
    for m, n, r in ((60, 50, 16), (9, 40, 12)):
        b, a = product(name, m, n, r, 1e5)
        dense = -0.5 * b.astype(float) @ a
        want = scipy.linalg.svdvals(dense)[: min(m, n, r)]
        found = factored.svd(array(b), array(a), scale=-0.5)
        u, s, vh = map(to_numpy, found)
        # backward error of QR and SVD: a few eps of |b| |a|
        size = 0.5 * np.linalg.norm(b.astype(float), 2) * np.linalg.norm(a.astype(float), 2)
        assert np.abs(s - want).max() <= 100 * 2.2e-16 * size
        assert np.abs(to_numpy(factored.singular_values(array(b), array(a), scale=-0.5)) - want).max() <= 1e-8 * size
        assert np.linalg.norm(u.astype(float) * s @ vh - dense) <= 20 * FP32 * np.linalg.norm(dense)
        assert np.abs(u.astype(float).T @ u - np.eye(len(s))).max() < 20 * FP32
        assert np.abs(vh.astype(float) @ vh.T - np.eye(len(s))).max() < 20 * FP32


@pytest.mark.parametrize("name", DIFFICULTIES)
def test_frobenius_and_inner_equal_the_dense_ones(array, name):
    b, a = product(name, 60, 50, 16, 1e4)
    b2, a2 = product("both steep", 60, 50, 7, 10, seed=1)
    dense, dense2 = b.astype(float) @ a, b2.astype(float) @ a2
    assert factored.frobenius(array(b), array(a), scale=-3.0) == pytest.approx(3 * np.linalg.norm(dense), rel=1e-6)
    got = factored.inner(array(b), array(a), array(b2), array(a2))
    size = np.prod([np.linalg.norm(x) for x in (b, a, b2, a2)])
    assert abs(got - np.sum(dense * dense2)) <= 1e-6 * size
    wide = [array(x.astype(np.float64)) for x in (b, a, b2, a2)]
    assert abs(factored.inner(*wide) - np.sum(dense * dense2)) <= 100 * 2.2e-16 * size


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("magnitudes", [(1e-20, 1e-20), (1e15, 1e15), (1e20, 1e-5)])
def test_norms_survive_magnitudes(array, magnitudes):
    b, a = product("both steep", 30, 40, 8, 10)
    b, a = b * np.float32(magnitudes[0]), a * np.float32(magnitudes[1])
    dense = b.astype(float) @ a
    assert factored.frobenius(array(b), array(a)) == pytest.approx(np.linalg.norm(dense), rel=1e-6, abs=0)
    assert factored.inner(array(b), array(a), array(b), array(a)) == pytest.approx(np.sum(dense**2), rel=1e-6, abs=0)


def test_inner_refuses_products_of_different_shapes(array):
    b, a = array(np.ones((4, 2))), array(np.ones((2, 5)))
    with pytest.raises(UsageError, match="different shapes"):
        factored.inner(b, a, b, array(np.ones((2, 6))))


def small_ones(array, count=7, r=5):
    rng = np.random.default_rng(3)
    return [(array(rng.standard_normal((9, r)), "float32"), array(rng.standard_normal((r, 8)), "float32"))
            for _ in range(count)]  # fmt: skip


def test_lists_are_worked_on_in_parts_of_bounded_size(array, monkeypatch):
    pairs = small_ones(array)
    seen = []
    whole = factored.spectra
    monkeypatch.setattr(factored, "spectra", lambda ps, *rest: seen.append(len(ps)) or whole(ps, *rest))
    together = factored.truncate_many(pairs, [1.0] * 7, [fixed(2)] * 7)
    monkeypatch.setattr(factored, "TOGETHER", 3 * (17 * 5 + 20 * 25))
    apart = factored.truncate_many(pairs, [1.0] * 7, [fixed(2)] * 7)
    assert seen == [7, 3, 3, 1]
    for one, other in zip(together, apart, strict=True):
        assert np.array_equal(to_numpy(one.b), to_numpy(other.b))
        assert np.array_equal(to_numpy(one.a), to_numpy(other.a))


def test_a_list_may_mix_forms_and_dtypes(array):
    rng = np.random.default_rng(4)
    shapes = [
        (9, 3, 8, "float32"),
        (9, 3, 8, "float64"),
        (5, 6, 4, "float32"),
        (9, 3, 8, "float16"),
        (9, 3, 8, "float32"),
    ]
    pairs = [(array(rng.standard_normal((m, r)), t), array(rng.standard_normal((r, n)), t)) for m, r, n, t in shapes]
    for (b, a), result in zip(pairs, factored.truncate_many(pairs, [2.0] * 5, [fixed(2)] * 5), strict=True):
        alone = factored.truncate(b, a, fixed(2), scale=2.0)
        assert dtype_name(result.b) == dtype_name(alone.b)
        assert np.array_equal(to_numpy(result.b), to_numpy(alone.b))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scale", [1e200, -1e40, 1e-40, 1e-200])
def test_scales_whose_squares_overflow_or_vanish(array, scale):
    b, a = small_ones(lambda x, t: array(x, "float64"), 1)[0]
    result, usual = (factored.truncate(b, a, fixed(2), scale=s) for s in (scale, np.sign(scale)))
    got, want = (
        to_numpy(x.b) / abs(s) ** 0.5 @ (to_numpy(x.a) / abs(s) ** 0.5) for x, s in ((result, scale), (usual, 1))
    )
    assert np.abs(got - want).max() < 1e-9 * np.abs(want).max()
    assert result.error == pytest.approx(usual.error, rel=1e-9)


@pytest.mark.filterwarnings("error")
def test_products_beyond_the_squares_of_fp64_are_measured():
    big = 1e120 * np.eye(3)
    assert factored.singular_values(big, big)[0] == pytest.approx(1e240)
    assert factored.frobenius(big, big) == pytest.approx(3**0.5 * 1e240)
    assert factored.frobenius(np.array([[1e-170]]), np.array([[1.0]])) == pytest.approx(1e-170, rel=1e-6)
