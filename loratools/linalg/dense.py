"""Singular value decompositions of a dense matrix: the exact one, and fbpca's as an independent second."""

from __future__ import annotations

from threading import Lock

from loratools.errors import UsageError
from loratools.leaf import Array
from loratools.linalg.factored import SVD
from loratools.linalg.namespace import device_of, namespace, to_device, to_numpy, up, working_dtype

_global_state = Lock()


def thin_svd(x: Array) -> SVD:
    """Return the exact thin SVD of x (..., m, n): u (..., m, c), s (..., c) descending, vh (..., c, n), c = min(m, n).

    In fp32 (fp64 for fp64). Cost about 22 c^3 flops for a square matrix.
    """
    x = up(x, working_dtype(x))
    return SVD(*namespace(x).linalg.svd(x, full_matrices=False))


def dense_svd(x: Array, k: int, *, seed: int) -> SVD:
    """Return the k leading singular triples of x (m, n) by fbpca (oversampling 10, 2 power iterations), on the CPU.

    fbpca draws from NumPy's global random state: it is seeded for the call and put back afterwards, under a lock.
    Raises UsageError unless 1 <= k <= min(m, n). Source: Halko, Martinsson, Tropp 2011; Li et al., "Algorithm 971".
    """
    if x.ndim != 2 or not 1 <= k <= min(x.shape):
        raise UsageError("no such decomposition", expected=f"a matrix, 1 <= k <= {min(x.shape)}", got=k)
    from fbpca import pca

    plain = to_numpy(up(x, working_dtype(x)))
    xp = namespace(plain)
    with _global_state:
        state = xp.random.get_state()
        try:
            xp.random.seed(seed % 2**32)
            parts = pca(plain, k=k, raw=True, n_iter=2, l=min(k + 10, *x.shape))
        finally:
            xp.random.set_state(state)
    return SVD(*parts) if namespace(x) is xp else SVD(*(_back(part, x) for part in parts))


def _back(part: Array, x: Array) -> Array:
    """Return a NumPy array as a torch tensor on the device of ``x``."""
    return to_device(part, device_of(x))
