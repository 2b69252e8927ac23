"""Statistics files: what is read, how modules are matched, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loratools.errors import FileError, FormatError, MismatchError
from loratools.io.stats import Stats, load_stats, save_stats

ONES = np.ones(4, np.float32)


def test_a_file_and_back(tmp_path: Path) -> None:
    tensors = {"a.q.in_diag": ONES, "a.q.out_diag": 2 * ONES, "b.in_gram": np.eye(3, dtype=np.float32)}
    save_file(tensors, tmp_path / "s.safetensors")
    found = load_stats(tmp_path / "s.safetensors")
    assert list(found) == ["a.q", "b"]
    assert found["a.q"].in_gram is None
    assert found["b"].inputs is found["b"].in_gram
    out = save_stats(found, tmp_path / "again.safetensors", metadata={"tokens": "5"})
    again = load_file(out)
    assert again.keys() == tensors.keys()
    assert all(np.array_equal(again[k], tensors[k]) for k in tensors)
    assert load_stats(found) is found
    assert list(load_stats(dict(found))) == ["a.q", "b"]
    assert list(load_stats(tensors)) == ["a.q", "b"]


def test_modules_are_matched_as_adapters_are() -> None:
    stats = load_stats({"model.layers.0.q.in_diag": ONES, "model.layers.1.q.in_diag": ONES, "experts.up.in_diag": ONES})
    assert stats.resolve(["model.layers.0.q.weight"]) == {"model.layers.0.q.weight": "model.layers.0.q"}
    assert stats.resolve(["layers.1.q.weight"]) == {"layers.1.q.weight": "model.layers.1.q"}
    assert stats.resolve(["model.experts.up"]) == {"model.experts.up": "experts.up"}  # a parameter that is no .weight
    assert stats.resolve(["model.layers.0.q.weight", "other.weight"]).keys() == {"model.layers.0.q.weight"}
    with pytest.raises(MismatchError, match="of no module of the adapter"):
        stats.resolve(["h.0.attn.weight"])
    assert stats.resolve([]) == {}


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"q.weight": ONES}, "are no statistics"),
        ({"in_diag": ONES}, "are no statistics"),
        ({"q.in_diag": np.eye(4, dtype=np.float32)}, "wrong shape"),
        ({"q.in_gram": ONES}, "wrong shape"),
        ({"q.in_gram": np.ones((3, 4), np.float32)}, "wrong shape"),
        ({"q.in_diag": np.ones(0, np.float32)}, "wrong shape"),
        ({"q.out_diag": np.ones(4, np.int32)}, "not floating"),
        ({"q.in_diag": np.array([1, np.nan], np.float32)}, "no mean of squares"),
        ({"q.in_diag": np.array([1, np.inf], np.float32)}, "no mean of squares"),
        ({"q.out_diag": np.array([1, -1e-9], np.float32)}, "no mean of squares"),
        ({"q.in_diag": ONES, "q.in_gram": np.eye(3, dtype=np.float32)}, "disagree"),
    ],
)
def test_what_is_no_statistic_is_refused(tensors: dict[str, np.ndarray], match: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "s.safetensors")
    with pytest.raises(FormatError, match=match) as caught:
        load_stats(tmp_path / "s.safetensors")
    assert str(tmp_path / "s.safetensors") in str(caught.value)
    with pytest.raises(FormatError, match=match):
        load_stats(tensors)


def test_other_files_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", **{"q.in_diag": ONES})
    with pytest.raises(FormatError, match="safetensors file"):
        load_stats(tmp_path / "s.npz")
    with pytest.raises(FormatError, match="one safetensors file"):
        load_stats(tmp_path)
    with pytest.raises(FileError):
        load_stats(tmp_path / "nowhere")


def test_stored_in_half_precision(tmp_path: Path) -> None:
    found = load_stats({"q.in_diag": ONES.astype(np.float16)})
    assert found["q"].in_diag is not None
    assert save_stats({"q": Stats(in_diag=found["q"].in_diag)}, tmp_path / "h.safetensors").is_file()
