"""Bounds on cosines, and the decisions made from them, against a dense fp64 judge."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from loratools.errors import NumericsError
from loratools.linalg import intruders
from loratools.linalg.intruders import dense_cosines, max_cosines
from loratools.linalg.krylov import leading
from loratools.linalg.namespace import to_numpy

DIGITS = Path(__file__).parents[2] / "fixtures" / "digits"
K = 10
TIE = 1e-3
"""Within this distance of eps a decision may go either way: singular vectors of fp32 weights are known no better."""

Module = tuple[str, np.ndarray, np.ndarray]  # name, W0, W0 + D


def judge(w0: np.ndarray, w: np.ndarray, k: int = K) -> np.ndarray:
    """Return the largest |cos| of each of the k leading left singular vectors, by two thin SVDs in fp64."""
    u0, s0, _ = np.linalg.svd(w0.astype(float), full_matrices=False)
    u, _, _ = np.linalg.svd(w.astype(float), full_matrices=False)
    return np.abs(u[:, :k].T @ u0[:, s0 > max(w0.shape) * 2.0**-52 * s0[0]]).max(axis=1)


def base(rng: np.random.Generator, m: int, n: int, form: str) -> np.ndarray:
    """Return weights: noise, noise with spikes, or a spectrum that falls to 1/300 of its largest value."""
    if form == "noise":
        return rng.standard_normal((m, n))
    c = min(m, n)
    u, _ = np.linalg.qr(rng.standard_normal((m, c)))
    v, _ = np.linalg.qr(rng.standard_normal((n, c)))
    if form == "steep":
        return (u * np.geomspace(1, 1 / 300, c)) @ v.T
    spikes = (m**0.5 + n**0.5) * (1 + 4 * np.arange(1, 33) ** -0.7)
    return rng.standard_normal((m, n)) + (u[:, :32] * spikes) @ v[:, :32].T


def update(rng: np.random.Generator, w0: np.ndarray, rank: int, size: float) -> np.ndarray:
    """Return an update of the given rank whose largest singular value is about ``size`` times the base's tenth."""
    m, n = w0.shape
    b = rng.standard_normal((m, rank)) * np.arange(1, rank + 1) ** -0.7
    d = b @ rng.standard_normal((rank, n))
    return d * (size * np.linalg.svd(w0, compute_uv=False)[9] / np.linalg.norm(d, 2))


def random_modules(count: int, sides: tuple[int, int], forms: str = "STW") -> Iterator[Module]:
    """Yield made modules, square, tall and wide in the order of ``forms``."""
    for i in range(count):
        rng = np.random.default_rng(i)
        large, small = int(rng.integers(*sides)), int(rng.integers(sides[0] // 2, sides[0]))
        m, n = {"S": (large, large), "T": (large, small), "W": (small, large)}[forms[i % len(forms)]]
        form = ("spiked", "noise", "steep")[(i // 3) % 3]
        w0 = base(rng, m, n, form)
        d = update(rng, w0, int(rng.integers(1, 17)), float(rng.uniform(0.5, 3)))
        yield f"{form} {m} x {n}", w0.astype(np.float32), (w0 + d).astype(np.float32)


def trained_modules() -> Iterator[Module]:
    """Yield every adapted matrix of the trained fixtures: low-rank adapters and the full fine-tune."""
    model = load_file(DIGITS / "base" / "model.safetensors")
    tuned = load_file(DIGITS / "tuned" / "model.safetensors")
    weights = {name: w.astype(np.float32) for name, w in model.items()}
    for folder in sorted(DIGITS.glob("r*")):
        if not folder.name.endswith("-dora"):  # a DoRA's update is tested where kinds are known
            factors = load_file(folder / "adapter_model.safetensors")
            for key in sorted(k for k in factors if k.endswith("lora_A.weight")):
                a, b = (factors[key.replace("lora_A", x)].astype(np.float32) for x in ("lora_A", "lora_B"))
                name = key.removeprefix("base_model.model.").replace("lora_A.", "")
                yield f"{folder.name} {name}", weights[name], weights[name] + 2 * b @ a
    for name in sorted(n for n, w in weights.items() if w.ndim == 2 and min(w.shape) > 2 * K and "proj" in n):
        yield f"tuned {name}", weights[name], tuned[name].astype(np.float32)


def check(module: Module, array=np.asarray, eps: float = 0.5) -> str:  # type: ignore[no-untyped-def]
    """Compare with the judge and return the method that decided."""
    name, w0, w = module
    truth = judge(w0, w)
    top = leading(array(w), K, key=(1, 2))
    found = max_cosines(array(w0), top.u, eps=eps, key=(3, 4), angle=top.angle)
    upper, lower, slack = (to_numpy(x) for x in (found.upper, found.lower, found.slack))
    assert (upper + slack + 1e-5 >= truth).all(), name  # the judge sees fp32 weights too: 1e-5 is its own rounding
    assert (lower - slack - 1e-5 <= truth).all(), name
    clear = np.abs(truth - eps) > TIE
    assert (to_numpy(found.intruders(eps)) == (truth < eps))[clear].all(), name
    assert (to_numpy(found.certain(eps)) | ~clear).all() or found.method == "dense", name
    return found.method


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the bounds decide matrices of any size, where the dense way would be quicker."""
    monkeypatch.setattr(intruders, "DENSE_SIDE", 20)


def test_decisions_are_those_of_the_judge(array) -> None:
    methods = [check(module, array) for module in random_modules(18, (400, 700))]
    assert methods.count("dense") <= 6  # the point is to do without


@pytest.mark.parametrize("eps", [0.3, 0.7])
def test_other_thresholds(eps: float) -> None:
    for module in random_modules(6, (400, 700)):
        check(module, eps=eps)


def test_trained_modules() -> None:
    for module in list(trained_modules())[::7]:
        check(module)


@pytest.mark.slow
def test_two_hundred_modules_without_a_disagreement() -> None:
    made = list(random_modules(110, (400, 1100), "STWTW"))  # half of the trained ones are square
    modules = [*made, *trained_modules()]
    shapes = [w.shape for _, w, _ in modules]
    thirds = [sum(f(m, n) for m, n in shapes) / len(shapes) for f in (int.__eq__, int.__gt__, int.__lt__)]
    assert len(modules) >= 200
    assert min(thirds) > 0.3
    methods = [check(module) for module in made]
    for module in modules[len(made) :]:
        check(module)
    assert methods.count("dense") <= len(methods) // 3


@pytest.mark.parametrize("shape", [(500, 500), (688, 256), (256, 688)])
def test_one_planted_direction_is_the_one_intruder(shape: tuple[int, int]) -> None:
    """W0 with a decaying spectrum and D = 5 s_1 u v^T at random: exactly one intruder, the first."""
    rng = np.random.default_rng(0)
    w0 = base(rng, *shape, "steep")
    u, v = (x / np.linalg.norm(x) for x in (rng.standard_normal(shape[0]), rng.standard_normal(shape[1])))
    w = (w0 + 5 * np.outer(u, v)).astype(np.float32)
    top = leading(w, K, key=(1, 2))
    found = max_cosines(w0.astype(np.float32), top.u, eps=0.5, key=(3, 4), angle=top.angle)
    assert list(found.intruders(0.5)) == [True] + [False] * (K - 1)
    assert found.certain(0.5).all()
    assert np.allclose(top.s[0], np.linalg.svd(w, compute_uv=False)[0], rtol=1e-5)


def test_a_scaled_base_has_no_intruder() -> None:
    w0 = base(np.random.default_rng(1), 300, 300, "spiked").astype(np.float32)
    top = leading(1.01 * w0, K, key=(1, 2))
    found = max_cosines(w0, top.u, eps=0.99, key=(3, 4), angle=top.angle)
    assert not found.intruders(0.99).any()
    assert found.certain(0.99).all()


def test_what_lies_outside_the_range_of_a_tall_matrix_is_no_neighbour() -> None:
    """A vector orthogonal to every thin singular vector has cosine 0, though W W^T has eigenvectors there."""
    rng = np.random.default_rng(2)
    w0 = base(rng, 688, 256, "spiked")
    q, _ = np.linalg.qr(np.concatenate([w0, rng.standard_normal((688, 3))], axis=1))
    found = max_cosines(w0.astype(np.float32), q[:, -3:].astype(np.float32), eps=0.5, key=(3, 4))
    assert (found.upper < 1e-3).all()
    assert found.method == "krylov"


def test_many_small_singular_values_take_the_triangular_way() -> None:
    rng = np.random.default_rng(3)
    w0 = base(rng, 900, 400, "steep")
    module = ("", w0.astype(np.float32), (w0 + update(rng, w0, 8, 2.0)).astype(np.float32))
    assert check(module) == "triangular"


@pytest.mark.parametrize("shape", [(300, 300), (500, 250), (250, 500)])
def test_base_of_low_rank(shape: tuple[int, int]) -> None:
    """Of the vectors that belong to singular value 0, a tall matrix has none; otherwise they are one direction."""
    rng = np.random.default_rng(4)
    m, n = shape
    w0 = (rng.integers(-3, 4, (m, 40)) @ rng.integers(-3, 4, (40, n))).astype(float)  # exact in fp32
    u = np.linalg.qr(np.concatenate([w0[:, :1], rng.standard_normal((m, 2))], axis=1))[0].astype(np.float32)
    found = max_cosines(w0.astype(np.float32), u, eps=0.5, key=(3, 4))
    exact = dense_cosines(w0, u.astype(float))
    outside = np.linalg.norm(u - np.linalg.qr(w0[:, :40])[0] @ (np.linalg.qr(w0[:, :40])[0].T @ u), axis=0)
    assert np.allclose(exact.upper[1:] < 0.5, m > n)
    assert m > n or np.allclose(exact.upper[1:], outside[1:], atol=1e-6)  # fp64
    assert (found.intruders(0.5) == exact.intruders(0.5)).all()


def test_more_vectors_than_a_block() -> None:
    rng = np.random.default_rng(5)
    w0 = base(rng, 600, 500, "spiked")
    w = (w0 + update(rng, w0, 8, 2.0)).astype(np.float32)
    top = leading(w, 24, key=(1, 2))
    found = max_cosines(w0.astype(np.float32), top.u, eps=0.5, key=(3, 4), angle=top.angle)
    assert ((judge(w0, w, 24) < 0.5) == found.intruders(0.5)).all()


def test_dense_on_request_and_when_steps_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    _, w0, w = next(random_modules(1, (400, 500)))
    u = leading(w, K, key=(1, 2)).u
    assert max_cosines(w0, u, eps=0.5, key=(3, 4), dense=True).method == "dense"
    monkeypatch.setattr(intruders, "CHECKS", (1,))
    found = max_cosines(w0, u, eps=0.5, key=(3, 4))
    assert found.method == "dense"
    assert np.allclose(found.upper, judge(w0, w), atol=2e-3)  # u to the angle that leading was asked for


def test_not_finite() -> None:
    w0 = np.ones((400, 300), np.float32)
    w0[5, 7] = np.inf
    with pytest.raises(NumericsError, match="not finite"):
        max_cosines(w0, np.eye(400, 3, dtype=np.float32), eps=0.5, key=(3, 4))
