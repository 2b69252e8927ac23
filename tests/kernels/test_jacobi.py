from __future__ import annotations

import pytest
import torch

from loratools.kernels import jacobi
from loratools.kernels.jacobi import svd, svd_reference

EPS = 2.0**-52


def check(x):
    """Values, product and orthogonality, each to a few orders eps of the largest value."""
    got, order = svd(x), x.shape[-1]
    size = torch.linalg.matrix_norm(x)
    allowed = 40 * order * EPS * size[:, None]
    assert bool(got.converged.all())
    assert bool(((got.s - svd_reference(x)[1]).abs() <= allowed).all())
    assert bool((got.s[:, :-1] >= got.s[:, 1:]).all())
    product = got.u @ torch.diag_embed(got.s) @ got.v.mT
    assert bool(((product - x).abs() <= allowed[:, :, None]).all())
    unit = torch.eye(order, dtype=torch.float64, device=x.device)
    assert float((got.v.mT @ got.v - unit).abs().max()) <= 40 * order * EPS
    return got


@pytest.mark.parametrize("order", [1, 2, 7])
def test_random_matrices(random, order):
    check(random(2 * order, order, torch.float32).double().reshape(2, order, order))


def test_positive_semidefinite_matrices_steep_flat_deficient_and_zero(random):
    q = torch.linalg.qr(random(4, 4, torch.float32).double())[0]
    spectra = [10.0 ** -torch.arange(0, 12, 3.0), torch.ones(4), torch.tensor([3.0, 2, 0, 0]), torch.zeros(4)]
    x = torch.stack([q @ torch.diag(s.double().to(q.device)) @ q.mT for s in spectra])
    got = check((x + x.mT) / 2)
    assert bool((got.u[3] == 0).all())


def test_sizes_far_from_one(random):
    sizes = torch.tensor([1e-150, 1e150], dtype=torch.float64, device=random(1, 1).device)
    check(random(6, 3, torch.float32).double().reshape(2, 3, 3) * sizes[:, None, None])


def test_nan_is_not_converged_and_spoils_no_other_matrix(random):
    x = random(8, 4, torch.float32).double().reshape(2, 4, 4)
    clean = svd(x)
    x[0, 1, 2] = float("nan")
    got = svd(x)
    assert got.converged.tolist() == [False, True]
    assert bool(got.s[0].isnan().any())
    assert torch.equal(got.s[1], clean.s[1])


def test_the_librarys_routine_answers_alike(random, monkeypatch):
    x = random(10, 5, torch.float32).double().reshape(2, 5, 5)
    ours = svd(x)
    monkeypatch.setattr(jacobi, "pick", lambda kernel, **shape: {"jacobi": 0, "warps": 4})
    theirs = svd(x)
    assert torch.allclose(ours.s, theirs.s, rtol=1e-13)
    x[0, 0, 0] = float("nan")
    assert svd(x).converged.tolist() == [False, True]
