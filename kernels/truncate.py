"""Exact truncation of all modules of an adapter at once: the fused body of ``linalg.factored.truncate_many``.

The mathematics is that of :mod:`loratools.linalg.cores`, stage by stage over all modules instead of module by module:
Gram matrices of every factor in one launch, the R x R work in a few batched calls in fp64, one transfer of the spectra
to the host, where ranks are chosen and trust is decided by the same rules, and thin products in one launch. Modules
that the fp32 Gram matrices cannot be trusted with go through the same stages with fp64 ones, and what is left after
that to the textbook (QR): the fallback belongs to the numerics, and every result names its route.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from loratools.dispatch import fuses
from loratools.kernels import jacobi
from loratools.kernels.gram import NOISE, grams
from loratools.kernels.target import Tensor, usable
from loratools.kernels.thin import thin
from loratools.linalg import factored
from loratools.linalg.cores import Cores, figures, trusted
from loratools.linalg.factored import Choose, Truncation
from loratools.linalg.gram import FP32, FP64, Precision

SHORT = FP32._replace(noise=NOISE)


class Module(NamedTuple):
    """One product scale * b @ a: b (m, R), a (R, n), and its place in the list."""

    place: int
    b: Tensor
    a: Tensor
    scale: float
    choose: Choose

    @property
    def values(self) -> int:
        """How many singular values the product has."""
        return int(min(*self.b.shape, *self.a.shape))


def accepts(pairs: Sequence[Any], scales: Sequence[float], chooses: Sequence[Choose]) -> bool:
    """True for products of ranks 1 to 128 of fp32, bf16 or fp16 factors on one GPU, with finite scales."""
    if not pairs or not len(pairs) == len(scales) == len(chooses) or not all(map(np.isfinite, scales)):
        return False
    return usable(*(x for pair in pairs for x in pair)) and all(
        b.ndim == a.ndim == 2 and b.shape[1] == a.shape[0] <= jacobi.LARGEST for b, a in pairs
    )


@fuses(factored.truncate_many, when=accepts)
def fused_truncate(
    pairs: Sequence[tuple[Tensor, Tensor]], scales: Sequence[float], chooses: Sequence[Choose]
) -> list[Truncation]:
    """Truncate every ``scale * b @ a``: same guarantees as :func:`loratools.linalg.factored.truncate`, same fields."""
    todo = [
        Module(i, b, a, float(scale), factored.capped(choose))
        for i, ((b, a), scale, choose) in enumerate(zip(pairs, scales, chooses, strict=True))
    ]
    done: dict[int, Truncation] = {}
    for precision in (SHORT, FP64):
        for group in _by_form(todo):
            done.update(_truncated(group, precision))
        todo = [x for x in todo if x.place not in done]
    done.update({x.place: factored.truncate(x.b, x.a, x.choose, scale=x.scale) for x in todo})
    return [done[i] for i in range(len(pairs))]


def _by_form(modules: Sequence[Module]) -> list[list[Module]]:
    """Group by rank, number of singular values and dtype: shapes may differ within a launch."""
    groups: dict[Any, list[Module]] = {}
    for x in modules:
        groups.setdefault((x.b.shape[1], x.values, x.b.dtype, x.a.dtype), []).append(x)
    return list(groups.values())


def _truncated(group: Sequence[Module], precision: Precision) -> dict[int, Truncation]:
    """Return the truncations, by place, of those modules of a group that this precision can be trusted with."""
    scale, count = torch.tensor([x.scale for x in group], dtype=torch.float64).to(group[0].b.device), group[0].values
    found = _cores(*_grams(group, precision), scale, count, precision)
    told = torch.cat([found.noise[:, None], found.s], 1).cpu().numpy()  # the one question to the device
    noise, s = told[:, 0], told[:, 1:]
    ranks = [x.choose(s[i]) if noise[i] > 0 else 0 for i, x in enumerate(group)]
    fine = trusted(s, noise, ranks, [x.choose for x in group])
    kept = [i for i in range(len(group)) if fine[i]]
    if not kept:
        return {}
    talls, wides = _factors([group[i] for i in kept], [ranks[i] for i in kept], found, kept, precision)
    held, spectra, route = figures(s, ranks), found.s.unbind(), f"gram{precision.dtype[-2:]}"
    return {
        group[i].place: Truncation(tall, wide, spectra[i], ranks[i], *held[i], route)
        for i, tall, wide in zip(kept, talls, wides, strict=True)
    }


def _grams(group: Sequence[Module], precision: Precision) -> tuple[Tensor, Tensor]:
    """Return b^T b and a a^T of every module, (batch, R, R) in fp64."""
    rank = group[0].b.shape[1]
    if precision.dtype == "float64":
        wide = [(x.b.double(), x.a.double()) for x in group]
        return torch.stack([b.mT @ b for b, _ in wide]), torch.stack([a @ a.mT for _, a in wide])
    talls, wides = [x.b for x in group], [x.a for x in group]
    if talls[0].dtype == wides[0].dtype:
        both = grams(talls + wides, wide=[False] * len(group) + [True] * len(group))
        gb, ga = both[: len(group)], both[len(group) :]
    else:
        gb, ga = grams(talls, wide=[False] * len(group)), grams(wides, wide=[True] * len(group))
    return gb[:, :rank, :rank], ga[:, :rank, :rank]


def _cores(gb: Tensor, ga: Tensor, scale: Tensor, count: int, precision: Precision) -> Cores:
    """Do what :func:`loratools.linalg.cores.of_grams` does, without a synchronisation; noise is NaN for zero, too."""
    nb, na = (torch.diagonal(g, dim1=-2, dim2=-1) for g in (gb, ga))
    faint_b, faint_a = nb < precision.faint, na < precision.faint
    fine = (torch.isfinite(nb) & torch.isfinite(na) & (faint_b == faint_a)).all(-1) & (~faint_b).any(-1)
    alive = (nb > 0) & (na > 0)
    gauge = torch.where(alive, nb / torch.where(alive, na, 1.0), 1.0) ** 0.25
    gauge = torch.where(fine[:, None], gauge, 1.0)
    unit = torch.eye(gb.shape[-1], dtype=torch.float64, device=gb.device)
    gb = torch.where(
        fine[:, None, None], gb * (scale**2)[:, None, None] / (gauge[:, :, None] * gauge[:, None, :]), unit
    )
    ga = torch.where(fine[:, None, None], ga * (gauge[:, :, None] * gauge[:, None, :]), unit)
    size_a = torch.linalg.matrix_norm(ga)
    size = size_a * torch.linalg.matrix_norm(gb)
    root, failed = torch.linalg.cholesky_ex(ga)
    lifted, still = torch.linalg.cholesky_ex(ga + (precision.noise * size_a)[:, None, None] * unit)
    root = torch.where((failed != 0)[:, None, None], lifted, root)
    fine = fine & ((failed == 0) | (still == 0)) & (size > 0)
    core = torch.where(fine[:, None, None], root.mT @ gb @ root, unit)
    _, energies, v, converged = jacobi.svd((core + core.mT) / 2)
    noise = torch.where(fine & converged, precision.noise * size, torch.nan)
    return Cores(torch.sqrt(energies[:, :count]), root @ v[:, :, :count], gb, gauge, scale, noise)


def _factors(
    group: Sequence[Module], ranks: Sequence[int], found: Cores, places: Sequence[int], precision: Precision
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the balanced factors b (m, k) and a (k, n) of every module in fp32: linalg.cores.balanced for a batch."""
    device, most = found.s.device, max(ranks)
    at, count = torch.tensor([list(places), list(ranks)]).to(device)
    s, lv, gb, gauge, scale, _ = (t[at] for t in found)
    s, lv, scale = s[:, None, :most], lv[:, :, :most], scale[:, None, None]
    kept = torch.arange(most, device=device) < count[:, None, None]
    s = torch.where(kept, s, 1.0)
    tall = torch.where(kept, lv * s**-0.5 * (scale / gauge[:, :, None]), 0.0)
    wide = torch.where(kept, (gb @ (lv * s**-1.5)) * gauge[:, :, None], 0.0)
    bs, as_, size = [x.b for x in group], [x.a for x in group], len(group)
    if precision.dtype == "float64":
        pairs = list(zip(bs, as_, tall, wide, ranks, strict=True))
        made = [((b.double() @ t[:, :k]).float(), (w[:, :k].mT @ a.double()).float()) for b, a, t, w, k in pairs]
        return [b for b, _ in made], [a for _, a in made]
    tall, wide = tall.float(), wide.float()
    if bs[0].dtype == as_[0].dtype:
        done = thin(bs + as_, torch.cat([tall, wide]), [*ranks, *ranks], wide=[False] * size + [True] * size)
        return done[:size], done[size:]
    return thin(bs, tall, ranks, wide=[False] * size), thin(as_, wide, ranks, wide=[True] * size)
