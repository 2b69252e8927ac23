"""Every kernel against its float64 reference on odd shapes, before anything is timed: worst error over its bound."""

from __future__ import annotations

from typing import Any

import torch

from loratools.kernels.compose import compose_reference, composed
from loratools.kernels.gram import NOISE, grams, grams_reference
from loratools.kernels.jacobi import svd, svd_reference
from loratools.kernels.philox import signs, signs_reference
from loratools.kernels.products import Matrices, sketch_reference, times_reference
from loratools.kernels.row_norms import direct, direct_reference
from loratools.kernels.row_norms_shared import shared
from loratools.kernels.thin import thin, thin_reference

SHAPES = [(33, 70, 5), (129, 40, 17)]
KEYS = [(1, 2), (3, 4)]


def run(device: torch.device) -> dict[str, float]:
    """Return check -> worst error over its bound; raises SystemExit where one exceeds 1."""
    generator = torch.Generator(device=device).manual_seed(0)
    found: dict[str, float] = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for shape in SHAPES:
            for name, value in _case(generator, dtype, *shape).items():
                key = f"{name}, {str(dtype).removeprefix('torch.')}"
                found[key] = max(found.get(key, 0.0), round(value, 4))
    bad = [name for name, value in found.items() if not value <= 1]  # NaN is bad
    if bad:
        raise SystemExit(f"beyond their bounds: {', '.join(bad)}; {found}")
    return found


def _case(generator: torch.Generator, dtype: torch.dtype, m: int, n: int, rank: int) -> dict[str, float]:
    normal = lambda *s: torch.randn(*s, generator=generator, device=generator.device)  # noqa: E731
    w, b, a = normal(m, n).to(dtype), (0.2 * normal(m, rank)).to(dtype), normal(rank, n).to(dtype)
    core, x, y, gain = normal(1, rank, 3), normal(1, n, 4), normal(1, m, 4), 1 + 0.01 * normal(m)
    true, batch = direct_reference(w, b, a, 0.5).sqrt(), Matrices([w])
    gram = grams_reference([b, a], wide=[False, True])
    length = [g.diagonal().sqrt() for g in gram]
    square = normal(2, 6, 6).double()
    return {
        "row_norms": _worst(direct(w, b, a, 0.5), true, 2e-6 * true),
        "row_norms_shared": max(_worst(x, true, 2e-6 * true) for x in shared(w, [b, b], [a, a], [0.5, 0.5])),
        "compose": _worst(composed(w, b, a, gain, 0.5), compose_reference(w, b, a, gain, 0.5), 1e-5 * _spread(w, b, a)),
        "gram": max(
            _worst(got[:rank, :rank], want, 4 * NOISE * size[:, None] * size)
            for got, want, size in zip(grams([b, a], wide=[False, True]), gram, length, strict=True)
        ),
        "thin": _worst(
            thin([b], core, [3], wide=[False])[0],
            thin_reference([b], [core[0]], wide=[False])[0],
            2e-6 * thin_reference([b.abs()], [core[0].abs()], wide=[False])[0],
        ),
        "small_svd": _worst(svd(square).s, svd_reference(square)[1], 1e-13 * torch.linalg.matrix_norm(square)[:, None]),
        "signs": _worst(
            signs(KEYS, n, 5, w.device)[0].cpu().double(), signs_reference(KEYS[0], n, 5), torch.tensor(1e-9)
        ),
        "sketch": _worst(
            batch.sketch(KEYS[:1], 4)[0], sketch_reference(w, None, KEYS[0], 4), 2.0**-13 * _rows(w) * n**0.5
        ),
        "times": _worst(batch.times(x)[0], times_reference(w, None, x[0]), 2.0**-20 * _rows(w) * _rows(x[0].mT).mT),
        "turned": _worst(
            batch.turned_times(y)[0], times_reference(w.mT, None, y[0]), 2.0**-20 * _rows(w.mT) * _rows(y[0].mT).mT
        ),
    }


def _worst(got: torch.Tensor, want: torch.Tensor, bound: Any) -> float:
    return float(((got.double() - want).abs() / bound).max())


def _rows(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x.double(), dim=1)[:, None]


def _spread(w: torch.Tensor, b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return w.double().abs() + b.double().abs() @ a.double().abs()
