"""Small updates in float64 and what they are as plain matrices."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from loratools.kinds.lowrank import LowRank

M, N = 23, 17


@pytest.fixture
def tasks() -> Callable[..., tuple[list[LowRank], list[np.ndarray]]]:
    """tasks(3, 1, 4) -> low-rank updates of these ranks (scales 1, 2, -0.5, ...) and the dense matrices they are."""

    def make(*ranks: int) -> tuple[list[LowRank], list[np.ndarray]]:
        rng = np.random.default_rng(7)
        scales = [1.0, 2.0, -0.5, 0.25]
        made = [
            LowRank(rng.standard_normal((M, r)) / 5, rng.standard_normal((r, N)) / 4, s)
            for r, s in zip(ranks, scales, strict=False)
        ]
        return made, [u.scale * u.b @ u.a for u in made]

    return make
