"""Randomised SVD of many matrices at once: the fused body of ``linalg.rsvd.rsvd_many``.

The algorithm is :func:`loratools.linalg.rsvd.rsvd`, stage by stage over a batch. Matrices in memory, plain or as
``tuned - base``, go through :mod:`loratools.kernels.products`; an operator that is only known by its products (a DoRA,
Kronecker or Hadamard update) makes its own, on a test matrix from the same generator. Every block is orthonormalised by
CholeskyQR2 in fp64 over the whole batch without a synchronisation; what broke down there is asked for once, at the
end, and done again by the textbook, which falls back to Householder QR.

Power iterations work with blocks cut to 16 bits, the last of them and the projection at full precision, so that the
result is as accurate as fp32 allows: the basis lies in the range of D itself, and errors of 2^-16 between the
iterations are damped like any other part of the block outside the leading directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import unwrap
from typing import Any, NamedTuple, Protocol

import torch

from loratools.dispatch import fuses
from loratools.errors import UsageError
from loratools.kernels import jacobi
from loratools.kernels.philox import signs
from loratools.kernels.products import Matrices
from loratools.kernels.target import Tensor, usable
from loratools.linalg.factored import SVD
from loratools.linalg.rsvd import Change, Matrix, Operator, rsvd, rsvd_many
from loratools.linalg.seeds import Key

TEXTBOOK = unwrap(rsvd)

STRETCH = 256
"""Rows of one product in :func:`inner`."""

FIRST_ROUND = 1e-2
"""How far from orthonormal, times the columns, the first round of CholeskyQR may leave a block: see linalg.orth."""


class Batch(Protocol):
    """Products of a batch of (m, n) operators with blocks (batch, n, l) and (batch, m, l), in fp32."""

    shape: tuple[int, int]
    device: torch.device

    def sketch(self, keys: Sequence[Key], width: int) -> Tensor:
        """Return D times the test matrices of the keys."""
        ...

    def times(self, x: Tensor, *, count: int = 3) -> Tensor:
        """Return D x."""
        ...

    def turned_times(self, y: Tensor, *, count: int = 3) -> Tensor:
        """Return D^T y."""
        ...


class Implicit:
    """A batch of operators known by their own products; their arithmetic is theirs, the test matrix is ours."""

    def __init__(self, ops: Sequence[Operator]) -> None:
        self.ops = list(ops)
        self.shape: tuple[int, int] = (ops[0].shape[-2], ops[0].shape[-1])
        self.device: torch.device = ops[0].like.device  # type: ignore[attr-defined]

    def sketch(self, keys: Sequence[Key], width: int) -> Tensor:
        """Return D times the test matrices of the keys."""
        return self.times(signs(list(keys), self.shape[1], width, self.device).float())

    def times(self, x: Tensor, *, count: int = 3) -> Tensor:
        """Return D x; ``count`` is for matrices."""
        return torch.stack([op.matmul(block) for op, block in zip(self.ops, x, strict=True)]).float()

    def turned_times(self, y: Tensor, *, count: int = 3) -> Tensor:
        """Return D^T y; ``count`` is for matrices."""
        return torch.stack([op.rmatmul(block) for op, block in zip(self.ops, y, strict=True)]).float()


class Decomposed(NamedTuple):
    """u (batch, m, k), s (batch, k), vh (batch, k, n) in fp32, s in fp64; ``fine (batch,)``: did not break down."""

    u: Tensor
    s: Tensor
    vh: Tensor
    fine: Tensor


def accepts(
    ops: Sequence[Any], ks: Sequence[int], keys: Sequence[Key], *, oversample: int = 10, power: int = 2
) -> bool:
    """True for matrices, differences and operators of fp32, bf16 or fp16 on one GPU and sketches up to 128 columns."""
    if not ops or not len(ops) == len(ks) == len(keys):
        return False
    held = [x for op in ops for x in _held(op)]
    return (
        usable(*held)
        and all(len(op.shape) == 2 for op in ops)
        and all(x.ndim == 2 and x.stride(1) == 1 for op in ops if _is_dense(op) for x in _held(op))
        and max(min(k + oversample, *op.shape) for k, op in zip(ks, ops, strict=True)) <= jacobi.LARGEST
    )


def accepts_one(op: Any, k: int, *, oversample: int = 10, power: int = 2, key: Key) -> bool:
    """True for a matrix, difference or operator of fp32, bf16 or fp16 on a GPU, sketch up to 128 columns."""
    return accepts([op], [k], [key], oversample=oversample, power=power)


@fuses(rsvd, when=accepts_one)
def fused_rsvd_one(op: Any, k: int, *, oversample: int = 10, power: int = 2, key: Key) -> SVD:
    """Return :func:`fused_rsvd` of one operator."""
    return fused_rsvd([op], [k], [key], oversample=oversample, power=power)[0]


@fuses(rsvd_many, when=accepts)
def fused_rsvd(
    ops: Sequence[Any], ks: Sequence[int], keys: Sequence[Key], *, oversample: int = 10, power: int = 2
) -> list[SVD]:
    """Return the k leading singular triples of every operator: fields and guarantees of :func:`linalg.rsvd.rsvd`.

    Equal shapes, dtypes and ranks are one batch. Broken-down items are done again by the textbook.
    """
    done: dict[int, SVD] = {}
    for group in _by_form(ops, ks):
        k, (m, n) = ks[group[0]], ops[group[0]].shape
        if not 1 <= k <= min(m, n) or oversample < 0 or power < 0:
            raise UsageError("no such sketch", expected=f"1 <= k <= {min(m, n)}", got=(k, oversample, power))
        batch = _batch([ops[i] for i in group])
        found = decomposed(batch, k, [keys[i] for i in group], width=min(k + oversample, m, n), power=power)
        fine = found.fine.tolist()  # the one synchronisation
        for at, i in enumerate(group):
            done[i] = (
                SVD(found.u[at], found.s[at], found.vh[at])
                if fine[at]
                else TEXTBOOK(ops[i], k, oversample=oversample, power=power, key=keys[i])
            )
    return [done[i] for i in range(len(ops))]


def decomposed(batch: Batch, k: int, keys: Sequence[Key], *, width: int, power: int) -> Decomposed:
    """Return the k leading singular triples of a batch, sketched with ``width`` columns, without a synchronisation."""
    q, fine = orthonormal(batch.sketch(keys, width))
    for step in range(power):
        z, also = orthonormal(batch.turned_times(q, count=2))
        q, too = orthonormal(batch.times(z, count=3 if step == power - 1 else 2))
        fine = fine & also & too
    z = batch.turned_times(q)
    right, also = orthonormal(z)
    core = jacobi.svd(
        inner(z.double(), right.double())
    )  # (l, l): z^T right = u s v^T, so D = q z^T = (q u) s (right v)^T
    u, v = q.double() @ core.u[..., :k], right.double() @ core.v[..., :k]
    fine = fine & also & core.converged & (core.s[..., k - 1] > 0)
    return Decomposed(u.float(), core.s[..., :k], v.mT.float(), fine)


def orthonormal(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return orthonormal bases q (batch, m, l) in fp32 of the columns of y, and which of them can be trusted.

    CholeskyQR2 in fp64; not to be trusted where a factor broke down or the first round is far from orthonormal, as
    in :func:`loratools.linalg.orth.orthonormalise`.
    """
    q, fine = _cholesky_qr(y.double())
    gram = inner(q, q)
    unit = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    near = (gram - unit).abs().amax(dim=(-1, -2)) <= FIRST_ROUND / gram.shape[-1]  # false for NaN
    q, also = _cholesky_qr(q, gram)
    return q.float(), fine & near & also


def inner(x: Tensor, y: Tensor) -> Tensor:
    """Return x^T y of x (batch, n, p), y (batch, n, q), by stretches that run side by side.

    The library gives each product of a batch to one processor however long it is, and a batch is smaller than a GPU.
    """
    batch, n, _ = x.shape
    count = n // STRETCH
    if count < 2:
        return x.mT @ y
    cut = count * STRETCH
    left, right = (t[:, :cut].reshape(batch * count, STRETCH, -1) for t in (x, y))
    total = (left.mT @ right).reshape(batch, count, x.shape[-1], y.shape[-1]).sum(1)
    return total if cut == n else total + x[:, cut:].mT @ y[:, cut:]


def _cholesky_qr(y: Tensor, gram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    gram = inner(y, y) if gram is None else gram
    factor, failed = torch.linalg.cholesky_ex(gram)
    unit = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    return y @ torch.linalg.solve_triangular(factor, unit, upper=False).mT, failed == 0


def _is_dense(op: Any) -> bool:
    return isinstance(op, torch.Tensor | Matrix | Change)


def _held(op: Any) -> tuple[Any, ...]:
    """Return the tensors of a matrix or a difference; of another operator, the one that says where it lives."""
    if isinstance(op, Change):
        return op.like, op.base
    return (op if isinstance(op, torch.Tensor) else getattr(op, "like", None),)


def _by_form(ops: Sequence[Any], ks: Sequence[int]) -> list[list[int]]:
    groups: dict[Any, list[int]] = {}
    for i, (op, k) in enumerate(zip(ops, ks, strict=True)):
        form = type(op) if _is_dense(op) else object
        groups.setdefault((form, tuple(op.shape), k, tuple(x.dtype for x in _held(op))), []).append(i)
    return list(groups.values())


def _batch(ops: Sequence[Any]) -> Batch:
    if not _is_dense(ops[0]):
        return Implicit(ops)
    held = [_held(op) for op in ops]
    return Matrices([x[0] for x in held], [x[1] for x in held] if len(held[0]) == 2 else None)
