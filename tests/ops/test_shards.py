"""split and join: disjoint shards, sizes within one, and back bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import loratools as lt
from loratools.core.adapter import Adapter
from loratools.core.update import tensors
from loratools.errors import MismatchError, UsageError
from loratools.kinds.dora import Dora
from loratools.kinds.lowrank import LowRank
from loratools.linalg.namespace import to_numpy
from loratools.ops.shards import MODES, join, split

DIGITS = Path(__file__).parents[2] / "fixtures" / "digits" / "r4"


def made(dtype: Any = np.float32) -> Adapter:
    rng = np.random.default_rng(0)
    b, a = (rng.standard_normal(s).astype(dtype) for s in ((7, 3), (3, 11)))
    b[0, 0], b[1, 1], a[0, 0] = -0.0, np.nan, np.inf  # bits are bits
    return Adapter(
        {
            "x.weight": LowRank(b, a, 2.0),
            "y.weight": Dora(LowRank(a.T, b.T, 0.5), np.abs(rng.standard_normal(11).astype(dtype))),
        }
    )


def bits(adapter: Adapter) -> list[bytes]:
    return [to_numpy(t).tobytes() for u in adapter.values() for _, t in tensors(u)]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("by", MODES)
@pytest.mark.parametrize("parts", [2, 4, 5])
def test_joined_shards_are_the_adapter_bit_for_bit(parts: int, by: str, dtype: Any) -> None:
    adapter = made(dtype)
    shards = split(adapter, parts, by=by, seed=3)
    assert bits(join(shards)) == bits(adapter)
    assert bits(join(shards[::-1])) == bits(adapter)
    assert [u.kind for u in join(shards).values()] == [u.kind for u in adapter.values()]
    for i, (_, whole) in enumerate((f, t) for u in adapter.values() for f, t in tensors(u)):
        cut = [to_numpy([t for u in s.values() for _, t in tensors(u)][i]) for s in shards]
        counts = [int((c.view(f"uint{8 * c.dtype.itemsize}") != 0).sum()) for c in cut]
        assert sum(counts) == whole.size
        if by in ("all", "magnitude"):
            assert max(counts) - min(counts) <= 1  # sizes within one of N / K


def test_modes_cut_what_they_say() -> None:
    b = np.arange(1, 25, dtype=np.float32).reshape(6, 4)
    adapter = Adapter({"w": LowRank(b, np.ones((4, 5), np.float32))})
    for by, axis in (("row", 1), ("column", 0)):
        for shard in split(adapter, 2, by=by):
            held = to_numpy(shard["w"].b) != 0  # type: ignore[attr-defined]
            assert np.array_equal(held.all(axis=axis), held.any(axis=axis))  # whole rows or columns
    first, second = (to_numpy(s["w"].b) for s in split(adapter, 2, by="magnitude"))  # type: ignore[attr-defined]
    assert first[first != 0].min() > second.max()
    one, other = split(adapter, 2, seed=1), split(adapter, 2, seed=2)
    assert bits(one[0]) == bits(split(adapter, 2, seed=1)[0])
    assert bits(one[0]) != bits(other[0])


def test_a_real_adapter_through_files(tmp_path: Path) -> None:
    adapter = lt.load(DIGITS)
    paths = [lt.save(s, tmp_path / f"{k}.safetensors", format="native") for k, s in enumerate(lt.split(adapter, 3))]
    assert bits(lt.join([lt.load(p) for p in paths])) == bits(adapter)


def test_misuse_is_refused() -> None:
    adapter = made()
    for parts, by in ((1, "all"), (2, "diagonal"), (True, "all")):
        with pytest.raises(UsageError):
            split(adapter, parts, by=by)
    shards = split(adapter, 2)
    with pytest.raises(MismatchError, match="one entry"):
        join([shards[0], shards[0]])
    with pytest.raises(MismatchError):
        join([shards[0], Adapter({"other": adapter["x.weight"]})])
    with pytest.raises(MismatchError):
        join([])
