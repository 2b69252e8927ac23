from __future__ import annotations

import pytest
import torch

from loratools.core.generic import Operator
from loratools.errors import UsageError
from loratools.kinds.dense import Dense
from loratools.kinds.dora import Dora
from loratools.kinds.hadamard import Hadamard
from loratools.kinds.kronecker import Kronecker
from loratools.kinds.lowrank import LowRank
from loratools.linalg import seeds
from loratools.linalg.rsvd import Change, Matrix, rsvd, rsvd_many

BF16, FP32 = torch.bfloat16, torch.float32
pytestmark = pytest.mark.usefixtures("force")


def spectrum(random, m, n, values):
    """A matrix of the given singular values, in float64."""
    u, v = (torch.linalg.qr(random(size, size, FP32, size).double())[0] for size in (m, n))
    s = torch.tensor(values, dtype=torch.float64, device=u.device)
    return u[:, : len(s)] @ torch.diag(s) @ v[:, : len(s)].mT


def error(d, found):
    return float(torch.linalg.matrix_norm(d - found.u.double() @ torch.diag(found.s.double()) @ found.vh.double()))


def best(d, k):
    return float(torch.linalg.vector_norm(torch.linalg.svdvals(d.double())[k:]))


def orthonormal(found):
    unit = torch.eye(found.u.shape[1], dtype=torch.float64, device=found.u.device)
    grams = found.u.double().mT @ found.u.double(), found.vh.double() @ found.vh.double().mT
    return all(float((gram - unit).abs().max()) <= 1e-6 for gram in grams)


def test_matrices_and_differences_come_as_near_as_the_textbook(random):
    d = spectrum(random, 45, 30, [1 / (j + 1) ** 2 for j in range(30)])
    base = random(45, 30, FP32)
    ops = [d.to(BF16), Matrix(d.float()), Change(base + d.float(), base), Change((base + d).to(BF16), base.to(BF16))]
    keys = [seeds.key_of(i, "x") for i in range(4)]
    got = rsvd_many(ops, [2] * 4, keys, oversample=2)
    for op, key, found in zip(ops, keys, got, strict=True):
        held = op if isinstance(op, torch.Tensor) else op.like
        true = held.double() - (op.base.double() if isinstance(op, Change) else 0)
        again = rsvd(op, 2, oversample=2, key=key)
        # the same sketch: the bases differ by what 16 bits between the iterations do, which is of second order
        assert error(true, found) <= error(true, again) * (1 + 1e-6) + 1e-6 * float(torch.linalg.matrix_norm(true))
        assert error(true, found) <= 1.003 * best(true, 2)
        assert orthonormal(found)
        assert torch.allclose(found.s.double(), again.s.double(), rtol=1e-5)
        ours, theirs = (x.u.double() @ x.u.double().mT for x in (found, again))
        assert float((ours - theirs).abs().max()) <= 1e-3  # the same subspace


def test_exact_rank_is_exact_and_broken_down_items_fall_back(random):
    low = spectrum(random, 30, 20, [3.0, 2.0])
    ops = [low.float(), torch.zeros_like(low).float(), spectrum(random, 30, 20, [1.0] * 20).float()]
    got = rsvd_many(ops, [2] * 3, [seeds.key_of(0, "x")] * 3, oversample=2)
    assert error(low.float().double(), got[0]) <= 1e-6 * float(torch.linalg.matrix_norm(low))
    assert got[1].s.tolist() == [0, 0]
    assert all(map(orthonormal, got))


def test_operators_known_by_their_products(random):
    b, a = random(24, 3, FP32, 1), random(3, 20, FP32, 2)
    direction = LowRank(b, a, 0.5)
    w = random(24, 20, FP32, 4).contiguous()
    dora = Dora(direction, random(24, 1, FP32, 3)[:, 0].abs() + 0.5).delta(w)
    loha = Hadamard(direction, LowRank(random(24, 2, FP32, 5), random(2, 20, FP32, 6)))
    lokr = Kronecker(Dense(random(4, 4, FP32, 7).contiguous()), LowRank(random(6, 2, FP32, 8), random(2, 5, FP32, 9)))
    for u in (dora, loha, lokr):
        found = rsvd_many([Operator(u)], [2], [seeds.key_of(0, "x")], oversample=4, power=4)[0]
        assert error(u.dense().double(), found) <= 1.003 * best(u.dense(), 2)
        assert orthonormal(found)


def test_the_same_key_gives_the_same_bits_alone_and_in_a_batch(random):
    ops = [random(30, 20, BF16, seed) for seed in range(2)]
    keys = [seeds.key_of(i, "x") for i in range(2)]
    both = rsvd_many(ops, [2, 2], keys, oversample=2, power=1)
    alone = rsvd_many(ops[1:], [2], keys[1:], oversample=2, power=1)[0]
    assert torch.allclose(both[1].u, alone.u, atol=1e-6)
    assert torch.equal(rsvd_many(ops, [2, 2], keys, oversample=2, power=1)[1].u, both[1].u)


def test_what_cannot_be_sketched_is_refused(random):
    with pytest.raises(UsageError, match="no such sketch"):
        rsvd_many([random(5, 7, BF16)], [6], [(0, 0)])
