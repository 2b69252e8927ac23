from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from loratools.linalg.angles import principal_angles
from loratools.linalg.namespace import to_numpy


def orth(rng, m, k):
    return np.linalg.qr(rng.standard_normal((m, k)))[0]


@pytest.mark.parametrize(("k", "l"), [(1, 1), (3, 5), (5, 3), (4, 4)])
def test_angles_equal_scipys(array, k, l):  # noqa: E741
    rng = np.random.default_rng(k)
    q1, q2 = orth(rng, 20, k), orth(rng, 20, l)
    got = to_numpy(principal_angles(array(q1), array(q2)))
    assert np.abs(got - np.sort(scipy.linalg.subspace_angles(q1, q2))).max() < 100 * 2.2e-16
    dense = np.arccos(np.clip(np.linalg.svd(q1.T @ q2, compute_uv=False), 0, 1))  # good for large angles only
    assert np.abs(got - dense).max() < 1e-7


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-6, 0.3, np.pi / 4, 1.2, np.pi / 2])
def test_known_angles_large_and_small(array, angle):
    q1 = np.eye(4)[:, :2]
    q2 = np.array([[np.cos(angle), 0], [0, 1.0], [np.sin(angle), 0], [0, 0]])
    got = to_numpy(principal_angles(array(q1), array(q2)))
    assert np.abs(got - [0, angle]).max() < 1e-15


def test_equal_spaces_in_other_bases(array):
    rng = np.random.default_rng(0)
    q = orth(rng, 30, 6)
    assert to_numpy(principal_angles(array(q), array(q @ orth(rng, 6, 6)))).max() < 100 * 2.2e-16
