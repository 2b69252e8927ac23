"""Verbs over kinds. Each kind's file registers the rules that are better than the matrix-free default.

A rule must keep the promise written here: the contract tests run every rule of every kind against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch

from loratools.core.update import Delta, Update, tensors
from loratools.errors import ConversionError, MismatchError, NeedsBaseError, UsageError
from loratools.leaf import Array, Leaf
from loratools.linalg import seeds
from loratools.linalg.factored import SVD
from loratools.linalg.namespace import namespace, up

POWER = 4  # power iterations of the default: within 0.1% of the optimum on slowly decaying spectra (docs/numerics.md)
BLOCK = 256  # columns formed at a time where an operator must be looked at whole


@singledispatch
def svd(u: Update, k: int, *, seed: int = 0) -> SVD:
    """Return the ``k`` leading singular triplets: U (m, k), S (k,) descending and nonnegative, Vh (k, n).

    k <= min(m, n) of the matrix view, else :class:`UsageError`. The default is a randomized SVD (oversampling 10, four
    power iterations); rules for low-rank kinds are exact. Undefined for coats (:class:`NeedsBaseError`).
    """
    d = need_delta(u)
    m, n = d.matrix_shape
    if not 1 <= k <= min(m, n):
        raise UsageError("too many singular triplets asked for", expected=f"1 to {min(m, n)}", got=k)
    from loratools.linalg.rsvd import rsvd  # most runs find an exact rule

    return rsvd(Operator(d), k, power=POWER, key=seeds.key_of(seed, "svd"))


@singledispatch
def svdvals(u: Update) -> Array:
    """Return all min(m, n) or rank-many singular values, descending, fp64; the default forms the matrix."""
    d = need_delta(u)
    x = up(d.matrix(), "float64")
    return namespace(x).linalg.svdvals(x)


@singledispatch
def inner(u: Update, v: Delta) -> float:
    """Return the Frobenius inner product <U, V>; the default forms ``BLOCK`` columns of both at a time."""
    d = need_delta(u)
    if d.matrix_shape != v.matrix_shape and d.shape != v.shape:
        raise MismatchError("inner product of different shapes", expected=d.shape, got=v.shape)
    if _has_rule(v) and not _has_rule(d):
        return float(inner(v, d))  # the better rule sits on the other side
    starts = range(0, d.matrix_shape[1], BLOCK)
    return float(sum(float((_columns(d, start) * _columns(v, start)).sum()) for start in starts))


def _has_rule(u: Update) -> bool:
    return inner.dispatch(type(u)) is not inner.dispatch(Update)


def _columns(d: Delta, start: int) -> Array:
    """Return columns start .. start + BLOCK of the matrix view, fp64."""
    like = up(next(t for _, t in tensors(d)))
    xp, n = namespace(like), d.matrix_shape[1]
    return up(d.matmul(xp.eye(n, min(BLOCK, n - start), k=-start, dtype=like.dtype)), "float64")


@singledispatch
def transposed(u: Update) -> Update:
    """Return the same change of the transposed parameter: W^T -> (W')^T; for two axes. Nothing is read or formed."""
    raise ConversionError(f"a {u.kind} update has no transpose", got=u.shape)


def norm(u: Update) -> float:
    """Return the Frobenius norm of an update."""
    return float(max(inner(u, need_delta(u)), 0.0) ** 0.5)


def convert(u: Update, accepts: Sequence[type[Update]], *, lossy: bool = False) -> Update:
    """Return ``u`` as one of the accepted kinds by the cheapest exact route (any route if ``lossy``).

    Raises :class:`ConversionError` that names the best lossy route where no exact one exists.
    """
    if isinstance(u, tuple(accepts)):
        return u
    from loratools.core.routes import shortest

    path = shortest(type(u), accepts, lossy=lossy)
    if path is None:
        raise ConversionError(
            f"no {'' if lossy else 'exact '}route from {u.kind} to {' or '.join(k.kind for k in accepts)}",
            hint=_lossy_hint(u, accepts, lossy),
        )
    for step in path:
        u = step.run(u)
    return u


def _lossy_hint(u: Update, accepts: Sequence[type[Update]], lossy: bool) -> str | None:
    from loratools.core.routes import shortest

    path = None if lossy else shortest(type(u), accepts, lossy=True)
    return None if path is None else f"--lossy would go {' -> '.join([u.kind, *(s.target.kind for s in path)])}"


def need_delta(u: Update) -> Delta:
    """Return ``u`` if it is base-free, else raise :class:`NeedsBaseError`."""
    if isinstance(u, Delta):
        return u
    raise NeedsBaseError(f"a {u.kind} update is only defined together with its base weights", hint="pass --base")


class Operator:
    """A Delta as a matrix for :mod:`loratools.linalg`; ``like`` is any of its arrays in memory, for the device."""

    def __init__(self, delta: Delta) -> None:
        self.shape = delta.matrix_shape
        self.matmul = delta.matmul
        self.rmatmul = delta.rmatmul
        self.like = next((t for _, t in tensors(delta) if not isinstance(t, Leaf)), None)
