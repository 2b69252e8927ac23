"""MatryoshkaLoRA's files: their shapes tell them from loralib's, their forward is the witness."""

from __future__ import annotations

import numpy as np
import pytest

import loratools as lt
from loratools.errors import FormatError, UnknownFormatError
from loratools.formats.base import FORMATS
from loratools.formats.detect import detect
from loratools.io.bundle import from_memory
from loratools.linalg.namespace import to_numpy


def held(a: tuple[int, int], b: tuple[int, int], name: str = "model.layers.0.q") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        f"{name}.lora_A": rng.standard_normal(a).astype("f4"),
        f"{name}.lora_B": rng.standard_normal(b).astype("f4"),
    }


@pytest.mark.parametrize(
    ("a", "b", "format"),
    [
        ((12, 4), (4, 10), "matryoshka"),
        ((4, 12), (10, 4), "loralib"),
        ((12, 4), (4, 12), "matryoshka"),  # square layers multiply both ways
        ((4, 12), (12, 4), "loralib"),
        ((12, 12), (12, 12), "loralib"),  # nothing tells
        ((12, 12), (12, 10), "matryoshka"),
        ((8, 12), (12, 4), "loralib"),  # its MergedLinear
    ],
)
def test_shapes_tell(a: tuple[int, int], b: tuple[int, int], format: str) -> None:
    assert detect(from_memory(held(a, b))).name == format


def test_the_forward_of_the_repository() -> None:
    tensors = held((12, 4), (4, 10))
    adapter = lt.from_state_dict(tensors)
    x = np.random.default_rng(1).standard_normal((3, 12)).astype("f4")
    want = (x @ tensors["model.layers.0.q.lora_A"]) @ tensors["model.layers.0.q.lora_B"]
    update = adapter["model.layers.0.q.weight"]
    assert np.allclose(x @ to_numpy(update.dense()).T, want, atol=1e-5)  # type: ignore[attr-defined]
    assert not adapter.meta.scaled
    assert any("does not say its scale" in r for r in adapter.meta.remarks)


def test_scales_are_written_into_the_factors() -> None:
    adapter = lt.from_state_dict(held((12, 4), (4, 10)))
    sliced = lt.slice(adapter, rank=2, scale_rule="sqrt")
    written = FORMATS["matryoshka"].encode(sliced).tensors
    again = FORMATS["matryoshka"].decode(from_memory({k: to_numpy(t) for k, t in written.items()}))
    got, want = (x["model.layers.0.q.weight"].dense() for x in (again, sliced))  # type: ignore[attr-defined]
    assert np.allclose(got, want, atol=1e-6)


def test_broken_files() -> None:
    good, bad = held((12, 4), (4, 10)), held((12, 4), (3, 10), "model.layers.1.q")
    with pytest.raises(FormatError):
        FORMATS["matryoshka"].decode(from_memory({**good, **bad}))
    half = {k: v for k, v in good.items() if k.endswith("A")}
    with pytest.raises((FormatError, UnknownFormatError)):
        lt.from_state_dict(half)
