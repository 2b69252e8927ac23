"""Types with a closed-form projection: nearest, idempotent, and loaded by PEFT as what the report says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratools as lt
from loratools.errors import ConversionError, UsageError
from loratools.kinds.lowrank import LowRank
from loratools.linalg.namespace import to_numpy
from loratools.ops.types.c3a import circulant_means
from loratools.ops.types.fourierft import coefficients
from loratools.ops.types.lokr import nearest_kronecker, split
from loratools.ops.types.miss import column_means
from loratools.ops.types.shira import largest
from loratools.ops.types.vera import least_squares_diagonal

rng = np.random.default_rng(0)
SETTINGS: dict[str, dict[str, Any]] = {
    "lokr": {"factor": 4},
    "vera": {"rank": 7},
    "fourierft": {"frequencies": 60},
    "shira": {"rank": 3},
    "c3a": {"block_size": 6},
    "miss": {"rank": 5},
}
SHAPES = {"down": (24, 36), "up": (36, 24), "square": (24, 24)}


def _adapter() -> Any:
    draw = np.random.default_rng(1).standard_normal
    tensors = {}
    for path, (m, n) in SHAPES.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = draw((4, n)).astype(np.float32)
        tensors[f"base_model.model.{path}.lora_B.weight"] = draw((m, 4)).astype(np.float32)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": list(SHAPES)}
    return lt.from_state_dict(tensors, config)


def _dense(adapter: Any) -> dict[str, Any]:
    return {name: u.dense() for name, u in adapter.items()}


def _need(name: str) -> None:
    if name == "fourierft":
        pytest.importorskip("torch", reason="torch is not installed")  # it draws the places


@pytest.mark.parametrize("name", SETTINGS)
def test_the_loss_is_told_and_projecting_again_loses_nothing(name: str) -> None:
    _need(name)
    adapter = _adapter()
    true = _dense(adapter)
    done = lt.convert(adapter, "peft", type=name, **SETTINGS[name])
    rows = {row["name"]: row for row in done.report.modules}  # type: ignore[union-attr]
    for parameter, d in _dense(done).items():
        error = np.linalg.norm(d - true[parameter]) / np.linalg.norm(true[parameter])
        assert rows[parameter]["relative_error"] == pytest.approx(error, rel=1e-4)
        assert 0 < error < 1
    again = lt.convert(done, "peft", type=name, **SETTINGS[name])
    for parameter, d in _dense(again).items():
        assert np.abs(d - done[parameter].dense()).max() <= 2e-6 * np.abs(d).max(), parameter  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", SETTINGS)
def test_peft_loads_what_is_written(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    done = lt.convert(_adapter(), "peft", type=name, **SETTINGS[name])
    lt.save(done, tmp_path / name, format="peft")
    torch.manual_seed(0)
    toy = torch.nn.Module()
    for path, (m, n) in SHAPES.items():
        toy.add_module(path, torch.nn.Linear(n, m))
    toy.forward = lambda x: x
    before = {key: t.detach().clone() for key, t in toy.state_dict().items()}
    merged = peft.PeftModel.from_pretrained(toy, tmp_path / name).merge_and_unload().state_dict()
    for parameter, d in _dense(done).items():
        found = (merged[parameter].double() - before[parameter]).numpy()
        assert np.abs(found - d).max() <= 1e-6 * max(np.abs(d).max(), 1.0), parameter
    for parameter, d in _dense(lt.load(tmp_path / name, base={k: t.numpy() for k, t in before.items()})).items():
        assert np.array_equal(d, done[parameter].dense()), parameter  # type: ignore[attr-defined]


def test_a_kronecker_product_is_found_again() -> None:
    w1, w2 = rng.standard_normal((3, 4)), rng.standard_normal((5, 2))
    d = np.kron(w1, w2)
    found = nearest_kronecker(d, 3, 4)
    assert np.allclose(np.kron(*found), d, atol=1e-6 * np.abs(d).max())
    assert np.linalg.norm(found[0]) == pytest.approx(np.linalg.norm(found[1]), rel=1e-5)
    noisy = d + rng.standard_normal(d.shape)
    best = np.linalg.svd(noisy.reshape(3, 5, 4, 2).transpose(0, 2, 1, 3).reshape(12, 10), compute_uv=False)
    lost = np.linalg.norm(noisy - np.kron(*nearest_kronecker(noisy, 3, 4)))
    assert lost == pytest.approx(np.sqrt((best[1:] ** 2).sum()), rel=1e-4)


@pytest.mark.parametrize("size", [1, 7, 12, 36, 127, 128, 256, 4096, 11008])
@pytest.mark.parametrize("factor", [-1, 2, 4, 8, 5])
def test_dimensions_are_split_as_peft_splits_them(size: int, factor: int) -> None:
    layer = pytest.importorskip("peft.tuners.lokr.layer", reason="peft is not installed")
    assert split(size, factor) == layer.factorization(size, factor)


def test_least_squares_between_projections() -> None:
    b, a, d = rng.standard_normal((9, 4)), rng.standard_normal((4, 7)), rng.standard_normal((9, 7))
    design = np.stack([np.outer(b[:, k], a[k]).ravel() for k in range(4)], axis=1)
    expected = np.linalg.lstsq(design, d.ravel(), rcond=None)[0]
    assert np.allclose(least_squares_diagonal(d, b, a), expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(4, 6), (5, 7), (1, 8), (6, 6)])
def test_fourier_coefficients_are_least_squares(shape: tuple[int, int]) -> None:
    m, n = shape
    d = rng.standard_normal(shape)
    for count in (1, m * n // 2, m * n):
        places = rng.permutation(m * n)[:count]
        found = coefficients(d, places // n, places % n, 3.0)
        waves = []
        for p in places:
            s = np.zeros(shape)
            s[p // n, p % n] = 3.0
            waves.append(np.fft.ifft2(s).real.ravel())
        design = np.stack(waves, axis=1)
        expected = np.linalg.lstsq(design, d.ravel(), rcond=None)[0]  # of least norm: conjugates share evenly
        assert np.allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_means_along_wrapped_diagonals_and_of_column_classes() -> None:
    d = rng.standard_normal((4, 6))
    k = circulant_means(d, 2)
    assert k.shape == (2, 3, 2)
    for i in range(2):
        for j in range(3):
            block = d[2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            assert np.allclose(k[i, j], [block.trace() / 2, (block[0, 1] + block[1, 0]) / 2])
    assert np.allclose(column_means(d, 4)[1], d[:, [1, 5]].mean(axis=1))
    assert np.allclose(column_means(d, 4)[3], d[:, 3])


def test_the_largest_entries_are_kept_the_first_of_equal_ones() -> None:
    d = np.array([[1.0, -3.0, 2.0], [3.0, 0.0, -3.0]])
    assert np.array_equal(to_numpy(largest(d, 2).dense()), [[0.0, -3.0, 0.0], [3.0, 0.0, 0.0]])


def test_what_no_projection_is_defined_for_is_refused_by_name() -> None:
    conv = {"base_model.model.c.lora_A.weight": np.ones((2, 3, 1, 1), np.float32),
            "base_model.model.c.lora_B.weight": np.ones((4, 2, 1, 1), np.float32)}  # fmt: skip
    adapter = lt.from_state_dict(conv, {"peft_type": "LORA", "r": 2, "lora_alpha": 2})
    with pytest.raises(ConversionError, match=r"c\.weight"):
        lt.convert(adapter, "peft", type="miss", rank=1)
    for name, settings in (("miss", {"rank": 25}), ("c3a", {"block_size": 5}), ("shira", {"rank": 99})):
        with pytest.raises(UsageError):
            lt.convert(_adapter(), "peft", type=name, **settings)


def test_made_a_type_it_can_be_squeezed_to_lora_again() -> None:
    made = lt.convert(_adapter(), "peft", type="miss", rank=5)
    done = lt.squeeze(made, rank=5)
    assert all(isinstance(u, LowRank) for u in done.values())
    for name, u in done.items():
        assert np.allclose(u.dense(), made[name].dense(), atol=1e-5)  # type: ignore[attr-defined]
