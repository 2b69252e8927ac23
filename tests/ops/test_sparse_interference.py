"""AWOM, AWOR and overlap against the products formed densely; the union of supports and its signs."""

from __future__ import annotations

import numpy as np
import pytest

from loratools.core.adapter import Adapter
from loratools.errors import MismatchError, UsageError
from loratools.fusion.sparse_union import sparse_union
from loratools.kinds.sparse import Sparse, of_entries
from loratools.ops.sparse_interference import pair, sparse_interference


def sparse(seed: int, share: float = 0.05, shape: tuple[int, int] = (30, 24)) -> Sparse:
    rng = np.random.default_rng(seed)
    size = shape[0] * shape[1]
    flat = np.sort(rng.permutation(size)[: int(share * size)]).astype(np.int64)
    return of_entries(flat, rng.standard_normal(len(flat)).astype(np.float32), shape)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.6])
def test_figures_are_those_of_the_dense_product(share: float) -> None:
    u, v = sparse(1, share), sparse(2, share)
    product = u.dense().astype(np.float64).T @ v.dense()
    found = pair(u, v)
    assert found["awom"] == pytest.approx(np.linalg.norm(product, 2), rel=0.02)
    assert found["awor"] == pytest.approx((product == 0).mean(), abs=1e-12)
    both = (u.dense() != 0) & (v.dense() != 0)
    assert found["overlap"] == pytest.approx(both.sum() / u.nnz)


def test_disjoint_rows_do_not_interfere() -> None:
    one = of_entries(np.arange(5, dtype=np.int64), np.ones(5, np.float32), (4, 6))
    two = of_entries(np.arange(12, 17, dtype=np.int64), np.ones(5, np.float32), (4, 6))
    assert pair(one, two) == {"awom": 0.0, "awor": 1.0, "overlap": 0.0, "opposed": 0.0}


def test_a_report_over_pairs() -> None:
    adapters = [Adapter({"x.weight": sparse(i)}) for i in range(3)]
    assert sparse_interference(adapters).total["pairs"] == 3
    with pytest.raises(UsageError):
        sparse_interference(adapters[:1])
    with pytest.raises(MismatchError):
        sparse_interference([adapters[0], Adapter({"y.weight": sparse(1)})])


def test_the_union_adds_and_elects_signs() -> None:
    u, v = sparse(1, 0.5), sparse(2, 0.5)
    a, b = 0.7 * u.dense().astype(np.float64), 0.5 * v.dense().astype(np.float64)
    assert np.allclose(sparse_union([u, v], [0.7, 0.5], elect=False).dense(), a + b, atol=1e-6)
    sign = np.sign(a + b)
    want = np.where(a * sign > 0, a, 0) + np.where(b * sign > 0, b, 0)
    assert np.allclose(sparse_union([u, v], [0.7, 0.5]).dense(), want, atol=1e-6)
    assert np.array_equal(sparse_union([u], [1.0]).dense(), u.dense())


def test_disjoint_supports_commute_bit_for_bit() -> None:
    flat = np.random.default_rng(0).permutation(720)[:100].astype(np.int64)
    values = np.random.default_rng(1).standard_normal(100).astype(np.float32)
    halves = [np.sort(part) for part in (flat[:50], flat[50:])]
    u, v = (of_entries(half, values[:50], (30, 24)) for half in halves)
    one, two = sparse_union([u, v], [1.0, 1.0]), sparse_union([v, u], [1.0, 1.0])
    assert np.array_equal(one.dense(), two.dense())
    w = np.random.default_rng(2).standard_normal((30, 24)).astype(np.float16)
    assert np.array_equal(v.apply(u.apply(w)), u.apply(v.apply(w)))


def test_adapters_are_fused_module_by_module() -> None:
    import loratools as lt
    from loratools.errors import UnsupportedError
    from loratools.kinds.lowrank import LowRank

    one, two = Adapter({"x.weight": sparse(1), "y.weight": sparse(3)}), Adapter({"x.weight": sparse(2)})
    done = lt.fuse_sparse([one, two], weights=[1.0, 0.5])
    assert np.array_equal(done["y.weight"].dense(), one["y.weight"].dense())
    assert np.array_equal(done["x.weight"].dense(), sparse_union([sparse(1), sparse(2)], [1.0, 0.5]).dense())
    with pytest.raises(UnsupportedError):
        lt.fuse_sparse([one, Adapter({"x.weight": LowRank.example(0)})])
    with pytest.raises(UsageError):
        lt.fuse_sparse([one, two], weights=[1.0])
