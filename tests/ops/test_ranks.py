from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratools as lt
from loratools.core.adapter import Adapter
from loratools.errors import NeedsBaseError, UsageError
from loratools.kinds.lowrank import LowRank
from loratools.kinds.replace import Replace
from loratools.ops.ranks import parse_size

RNG = np.random.default_rng(0)


def low_rank(m: int, r: int, n: int, decay: float = 0.6) -> LowRank:
    b = RNG.standard_normal((m, r)) * decay ** np.arange(r)
    return LowRank(b.astype(np.float32), RNG.standard_normal((r, n)).astype(np.float32), 2.0)


@pytest.fixture
def adapter() -> Adapter:
    factors = {"a": low_rank(40, 8, 30), "b": low_rank(20, 12, 50, 0.9), "c": low_rank(10, 3, 10)}
    updates = {f"{name}.weight": u for name, u in factors.items()}
    return Adapter({**updates, "h.bias": Replace(np.ones(5, np.float32))})


def ranks(adapter: Adapter) -> list[int]:
    return [u.rank for u in adapter.values() if isinstance(u, LowRank)]


@pytest.mark.parametrize(
    ("text", "size"),
    [("20MB", 20_000_000), ("20MiB", 20 << 20), ("1.5kB", 1500), ("7", 7), (7, 7), ("2gib", 2 << 30), (" 3 B", 3)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "20XB", "-3", "1e6", "20 M B"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


@pytest.mark.parametrize("format", ["peft", "native"])
@pytest.mark.parametrize("size", [3000, 5000, 8000, 12345, 10**6])
def test_the_file_keeps_the_budget_to_the_byte_and_uses_it(
    adapter: Adapter, tmp_path: Path, size: int, format: str
) -> None:
    squeezed = lt.squeeze(adapter, size=size, format=format)
    out = lt.save(squeezed, tmp_path / "x.safetensors", format=format)
    written = out.stat().st_size
    assert written <= size
    steps = [
        4 * (u.shape[0] + u.shape[1])
        for n, u in adapter.items()
        if isinstance(u, LowRank) and squeezed[n].rank < min(u.rank, *u.shape)
    ]
    assert not steps or size - written < min(steps) + 16  # no further rank fits (16: digits and padding of the header)


def test_a_budget_is_better_spent_than_a_uniform_rank(adapter: Adapter, tmp_path: Path) -> None:
    uniform = lt.squeeze(adapter, rank=2)
    size = lt.save(uniform, tmp_path / "u.safetensors", format="native").stat().st_size + 64
    shared = lt.squeeze(adapter, size=size, format="native")
    assert shared.report is not None
    assert uniform.report is not None
    assert shared.report.total["relative_error"] < uniform.report.total["relative_error"]


def test_an_impossible_budget_names_the_smallest_possible(adapter: Adapter, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="as small as that") as caught:
        lt.squeeze(adapter, size=100, format="peft")
    least = int(str(caught.value.expected).split()[2])
    out = lt.save(lt.squeeze(adapter, size=least, format="peft"), tmp_path / "x.safetensors", format="peft")
    assert out.stat().st_size <= least
    assert set(ranks(lt.load(out))) == {1}


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"rank": 5, "rank_multiple": 4}, [8, 8, 4]),
        ({"rank": 5, "rank_multiple": 4, "max_rank": 6}, [6, 6, 4]),
        ({"rank": 5, "uniform": True}, [5, 5, 5]),
        ({"energy": 1.0, "uniform": True}, [12, 12, 12]),
        ({"rank": 5, "consumer": "vllm"}, [8, 8, 8]),
        ({"rank": 1, "consumer": "vllm"}, [1, 1, 1]),
        ({"energy": 1.0, "consumer": "vllm"}, [16, 16, 16]),
    ],
)
def test_shapes_of_ranks(adapter: Adapter, how: dict[str, Any], expected: list[int]) -> None:
    squeezed = lt.squeeze(adapter, **how)
    assert ranks(squeezed) == expected
    for name, u in adapter.items():
        if isinstance(u, LowRank):
            v = squeezed[name]
            s = np.linalg.svd(u.dense(), compute_uv=False)
            optimum = np.sqrt((s[v.rank :] ** 2).sum())
            assert np.linalg.norm(v.dense() - u.dense()) <= optimum + 2e-6 * s[0]


def test_a_uniform_budget(adapter: Adapter, tmp_path: Path) -> None:
    squeezed = lt.squeeze(adapter, size=6000, uniform=True, format="peft")
    assert len(set(ranks(squeezed))) == 1
    out = lt.save(squeezed, tmp_path / "x.safetensors", format="peft")
    assert out.stat().st_size <= 6000
    bigger = lt.squeeze(adapter, rank=ranks(squeezed)[0] + 1, uniform=True)
    assert lt.save(bigger, tmp_path / "x.safetensors", format="peft", overwrite=True).stat().st_size > 6000


@pytest.mark.parametrize(
    "wrong", [{"rank": 2, "size": 100}, {"rank": 2, "rank_multiple": 0}, {"rank": 2, "consumer": "vlm"}, {"size": 0}]
)
def test_refusals(adapter: Adapter, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        lt.squeeze(adapter, **wrong)


def test_no_legal_rank_is_large_enough() -> None:
    with pytest.raises(UsageError, match="accepts no rank"):
        lt.squeeze(Adapter({"a.weight": low_rank(600, 600, 600, 1.0)}), rank=600, consumer="vllm")


def test_noise_keeps_what_stands_above_the_rounding_of_the_base() -> None:
    from loratools.linalg.namespace import down
    from loratools.linalg.noise import noise_edge

    w = down(RNG.standard_normal((60, 50)).astype(np.float32), "bfloat16")
    edge = noise_edge(w, "bfloat16")
    q = np.linalg.qr(RNG.standard_normal((60, 4)))[0].astype(np.float32)
    p = np.linalg.qr(RNG.standard_normal((50, 4)))[0].astype(np.float32)
    u = LowRank(q * np.array([9, 3, 0.5, 0.1], np.float32) * np.float32(edge), p.T, 1.0)
    base = {"x.weight": w}
    assert lt.squeeze(Adapter({"x.weight": u}), rank="noise", base=base)["x.weight"].rank == 2
    with pytest.raises(NeedsBaseError):
        lt.squeeze(Adapter({"x.weight": u}), rank="noise")
    with pytest.raises(UsageError, match="full precision"):
        lt.squeeze(Adapter({"x.weight": u}), rank="noise", base={"x.weight": w.astype(np.float32)})
