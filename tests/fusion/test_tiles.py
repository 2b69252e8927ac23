"""Rules on single entries in bounded memory: the same as on the whole, and thresholds exact."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from loratools.core.update import Array
from loratools.fusion import tiles
from loratools.fusion.base import FUSIONS
from loratools.fusion.tiles import Tiled, kth_largest, ranges, reader
from loratools.kinds.lowrank import LowRank


def steep(m: int, n: int, seed: int) -> LowRank:
    """Rows of very different size, so that a sample of rows misleads."""
    rng = np.random.default_rng(seed)
    b = rng.standard_normal((m, 3)) * np.exp(np.linspace(0, 6, m))[:, None]
    return LowRank(b, rng.standard_normal((3, n)))


@pytest.mark.parametrize("share", [1e-5, 0.01, 0.2, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("kind", ["even", "steep", "one huge row", "mostly zero"])
def test_the_kth_largest_is_exact_however_the_sample_misleads(
    kind: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "TILE", 1 << 12)
    monkeypatch.setattr(tiles, "SAMPLE", 1 << 10)
    rng = np.random.default_rng(0)
    x = {
        "even": rng.standard_normal((300, 70)),
        "steep": steep(300, 70, 1).dense(),
        "one huge row": rng.standard_normal((300, 70)) * np.where(np.arange(300) == 151, 1e6, 1.0)[:, None],
        "mostly zero": np.where(rng.random((300, 70)) < 0.01, rng.standard_normal((300, 70)), 0.0),
    }[kind]
    k = max(1, int(share * x.size))
    assert kth_largest(lambda i, j: x[i:j], x.shape, k) == np.sort(np.abs(x).ravel())[-k]


def test_tiles_cover_every_row_once() -> None:
    spans = ranges((1000, 3000))
    assert spans[0][0] == 0
    assert spans[-1][1] == 1000
    assert all(a[1] == b[0] for a, b in pairwise(spans))
    assert all((j - i) * 3000 <= tiles.TILE for i, j in spans)
    assert len(ranges((5, 1 << 21))) == 5  # a row is never divided


@pytest.mark.parametrize("name", ["ties", "magnitude", "dare", "dare-ties", "della", "breadcrumbs"])
def test_results_do_not_depend_on_the_tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = FUSIONS[name]
    deltas = [steep(60, 40, 1), steep(60, 40, 2)]
    given = {"seed": 0} if "seed" in method.handed_over else {}
    whole = method.run(deltas, [1.0, 0.5], **given).dense()
    monkeypatch.setattr(tiles, "TILE", 97)
    # the same products in blocks of other sizes: BLAS may order three terms differently
    assert np.allclose(method.run(deltas, [1.0, 0.5], **given).dense(), whole, rtol=8 * np.finfo(float).eps, atol=0)


def test_products_and_rows_of_a_tiled_update() -> None:
    u = steep(60, 40, 1)
    t = Tiled(u.shape, reader(u), u.b)
    x, y = np.random.default_rng(2).standard_normal((40, 5)), np.random.default_rng(3).standard_normal((60, 5))
    size = np.linalg.norm(u.dense())
    assert np.linalg.norm(t.matmul(x) - u.dense() @ x) <= 60 * np.finfo(float).eps * size * np.linalg.norm(x)
    assert np.linalg.norm(t.rmatmul(y) - u.dense().T @ y) <= 60 * np.finfo(float).eps * size * np.linalg.norm(y)


def test_no_tile_is_larger_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    u = steep(400, 50, 1)

    def read(i: int, j: int) -> Array:
        seen.append((j - i) * 50)
        return u.b[i:j] @ u.a

    monkeypatch.setattr(tiles, "TILE", 1000)
    tiles.tiled([u], [read], lambda xs, _: xs[0]).matmul(np.ones((50, 2)))
    assert max(seen) <= 1000
