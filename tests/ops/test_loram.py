from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loratools.core.adapter import Adapter
from loratools.errors import FormatError, MismatchError, NeedsBaseError, UnsupportedError
from loratools.io.base import Base
from loratools.kinds.dora import Dora
from loratools.kinds.lowrank import LowRank
from loratools.ops.loram import Kept, scatter, shrink
from loratools.ops.loram_index import read_index


def low(rng: Any, m: int, n: int, dtype: Any = np.float16) -> LowRank:
    return LowRank(rng.standard_normal((m, 2)).astype(dtype), rng.standard_normal((2, n)).astype(dtype), 0.5)


def test_scatter_is_exact_and_shrink_takes_it_back(rng: Any) -> None:
    small = Adapter({"x.weight": low(rng, 3, 4), "y.weight": low(rng, 5, 5)})
    kept = {"x.weight": Kept((6, 9), (0, 2, 5), (1, 2, 3, 8))}
    full = scatter(small, kept)
    d = np.zeros((6, 9), np.float32)
    d[np.ix_([0, 2, 5], [1, 2, 3, 8])] = small["x.weight"].dense()  # type: ignore[attr-defined]
    assert np.array_equal(full["x.weight"].dense(), d)  # type: ignore[attr-defined]
    assert full["y.weight"] is small["y.weight"]
    back = shrink(full, kept)["x.weight"]
    assert isinstance(back, LowRank)
    assert np.array_equal(back.b, small["x.weight"].b)  # type: ignore[attr-defined]
    assert np.array_equal(back.a, small["x.weight"].a)  # type: ignore[attr-defined]


def test_refusals(rng: Any) -> None:
    small = Adapter({"x.weight": low(rng, 3, 4)})
    with pytest.raises(MismatchError, match="shape that pruning left"):
        scatter(small, {"x.weight": Kept((6, 9), (0, 1))})
    with pytest.raises(MismatchError, match="names no module"):
        scatter(small, {"z.weight": Kept((6, 9), (0, 1, 2), None)})
    dora = Adapter({"x.weight": Dora(low(rng, 3, 4), np.ones(3, np.float32))})
    with pytest.raises(UnsupportedError, match="pruned base"):
        scatter(dora, {"x.weight": Kept((6, 4), (0, 1, 2))})


def index(path: Path, **said: Any) -> Path:
    path.write_text(json.dumps({"parameters": {"x.weight": said}}))
    return path


def test_the_json_index(rng: Any, tmp_path: Path) -> None:
    small = Adapter({"x.weight": low(rng, 3, 4)})
    kept = index(tmp_path / "a.json", shape=[6, 4], kept_rows=[5, 0, 2])
    dropped = index(tmp_path / "b.json", dropped_rows=[1, 3, 4])
    assert read_index(kept, small, None) == {"x.weight": Kept((6, 4), (0, 2, 5), None)}
    base = Base.open({"model.x.weight": np.zeros((6, 4))})
    assert read_index(dropped, small, base) == read_index(kept, small, base)
    with pytest.raises(NeedsBaseError):
        read_index(dropped, small, None)
    with pytest.raises(FormatError, match="no indices"):
        read_index(index(tmp_path / "c.json", shape=[6, 4], kept_rows=[6]), small, None)
    with pytest.raises(FormatError, match="repeat"):
        read_index(index(tmp_path / "c.json", shape=[6, 4], kept_rows=[1, 1]), small, None)
    with pytest.raises(MismatchError):
        read_index(index(tmp_path / "c.json", shape=[7, 4], kept_rows=[1]), small, base)
    (tmp_path / "d.json").write_text("{}")
    with pytest.raises(FormatError, match="table of parameters"):
        read_index(tmp_path / "d.json", small, None)


def test_the_directory_that_loram_writes(rng: Any, tmp_path: Path, model: Callable[..., Path]) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    size, heads, groups = 4, 4, 2  # two kv heads of four rows, two query heads each
    layer = "model.layers.1"
    shapes = {
        f"{layer}.self_attn.q_proj.weight": (16, 8), f"{layer}.self_attn.k_proj.weight": (8, 8),
        f"{layer}.self_attn.o_proj.weight": (8, 16), f"{layer}.mlp.gate_proj.weight": (10, 8),
        f"{layer}.mlp.down_proj.weight": (8, 10),
    }  # fmt: skip
    base = Base.open(model({n: np.zeros(s, np.float32) for n, s in shapes.items()}, hidden_size=16,
                           num_attention_heads=heads, num_key_value_heads=heads // groups))  # fmt: skip
    folder = tmp_path / "index"
    folder.mkdir()
    torch.save({"pruned_idx": torch.tensor([9, 1])}, folder / f"{layer}.mlp.gate_proj.pt")
    torch.save({"pruned_idx": torch.arange(size, 2 * size)}, folder / f"{layer}.self_attn.k_proj.pt")
    found = read_index(folder, Adapter({n: low(rng, *s) for n, s in shapes.items()}), base)
    assert found[f"{layer}.mlp.gate_proj.weight"].rows == (0, 2, 3, 4, 5, 6, 7, 8)
    assert found[f"{layer}.mlp.down_proj.weight"] == Kept((8, 10), None, (0, 2, 3, 4, 5, 6, 7, 8))
    assert found[f"{layer}.self_attn.k_proj.weight"].rows == tuple(range(size))
    assert found[f"{layer}.self_attn.q_proj.weight"].rows == tuple(range(groups * size))
    assert found[f"{layer}.self_attn.o_proj.weight"].columns == tuple(range(groups * size))
    torch.save({"pruned_idx": torch.tensor([1])}, folder / f"{layer}.self_attn.k_proj.pt")
    with pytest.raises(FormatError, match="whole heads"):
        read_index(folder, Adapter({}), base)
