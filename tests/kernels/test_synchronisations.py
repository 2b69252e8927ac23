"""How often a batched function asks the device: as often for many modules as for few, for every question waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loratools.core.adapter import Adapter
from loratools.kinds.lowrank import LowRank
from loratools.linalg import factored, rsvd, seeds
from loratools.linalg.row_norms import row_norms_many
from loratools.ops import squeeze

BF16 = torch.bfloat16
pytestmark = pytest.mark.usefixtures("force")


class _Answers(TorchDispatchMode):
    """Counts the numbers read off tensors: item, float and bool come down to one operator."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "_local_scalar_dense" in str(f)
        return f(*args, **(kwargs or {}))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], int]:
    """A function that runs another one and counts its questions, those of kernels' bodies under the interpreter not."""
    whole = [0]
    for name in ("tolist", "cpu"):
        taken = getattr(torch.Tensor, name)

        def counted(self: Any, *args: Any, taken: Any = taken, **kwargs: Any) -> Any:
            whole[0] += 1
            return taken(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)

    def run(f: Callable[[], Any]) -> int:
        from triton.runtime import interpreter

        body, answers = interpreter.GridExecutor.__call__, _Answers()

        def unwatched(self: Any, *args: Any, **kwargs: Any) -> Any:
            before = answers.count, whole[0]
            body(self, *args, **kwargs)
            answers.count, whole[0] = before

        with monkeypatch.context() as within:
            within.setattr(interpreter.GridExecutor, "__call__", unwatched)
            whole[0] = 0
            with answers:
                f()
        return answers.count + whole[0]

    return run


@pytest.mark.parametrize("count", [2, 5])
def test_truncating_and_sketching_ask_once(random, asked, count):
    pairs = [(random(24, 4, BF16, i), random(4, 20, BF16, 100 + i)) for i in range(count)]
    assert asked(lambda: factored.truncate_many(pairs, [2.0] * count, [lambda s: 2] * count)) == 1
    ops, keys = [random(30, 20, BF16, i) for i in range(count)], [seeds.key_of(i, "x") for i in range(count)]
    assert asked(lambda: rsvd.rsvd_many(ops, [2] * count, keys, oversample=2, power=1)) == 1


def test_norms_of_one_base_ask_twice_and_of_many_once(random, asked):
    w, b, a = random(20, 30, BF16), random(20, 3, BF16, 1), random(3, 30, BF16, 2)
    assert (
        asked(lambda: row_norms_many([w] * 4, [b] * 4, [a] * 4, [0.5] * 4)) == 2
    )  # did terms cancel? are all in range?
    others = [random(20, 30, BF16, i) for i in range(4)]
    assert asked(lambda: row_norms_many(others, [b] * 4, [a] * 4, [0.5] * 4)) == 1


@pytest.mark.parametrize("keep_alpha", [False, True])
def test_a_squeeze_asks_as_often_for_many_modules_as_for_few(random, asked, monkeypatch, keep_alpha):
    monkeypatch.setattr(squeeze, "device_of", lambda x: "cuda:0")
    monkeypatch.setattr("loratools.core.adapter.device_of", lambda x: "cuda:0")
    monkeypatch.setattr("loratools.dispatch._has_accelerator", lambda args: True)
    found = []
    for count in (2, 5):
        updates = {
            f"layers.{i}.q.weight": LowRank(
                random(24, 6, BF16, i).contiguous(), random(6, 20, BF16, 9 + i).contiguous(), 2.0
            )
            for i in range(count)
        }
        found.append(asked(lambda updates=updates: squeeze.squeeze(Adapter(updates), rank=2, keep_alpha=keep_alpha)))
    assert (
        found[0] == found[1] == 3
    ) != keep_alpha  # trust, spectra, finiteness; a scale to be kept is checked module by module


def test_storing_together_gives_the_same_as_storing_one_by_one(random, monkeypatch):
    updates = {
        f"layers.{i}.q.weight": LowRank(
            random(24, 6, BF16, i).contiguous(), random(6, 20, BF16, 9 + i).contiguous(), 2.0
        )
        for i in range(3)
    }
    one_by_one = squeeze.squeeze(Adapter(updates), rank=2)
    monkeypatch.setattr(squeeze, "device_of", lambda x: "cuda:0")
    together = squeeze.squeeze(Adapter(updates), rank=2)
    for name, u in one_by_one.items():
        assert torch.equal(u.b, together[name].b)
        assert torch.equal(u.a, together[name].a)
    assert together.report.total == pytest.approx(one_by_one.report.total, rel=1e-9)
