"""Annealed ranks: every squeeze is the optimal truncation at an unchanged scale, and the optimizer goes along."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratools as lt
from loratools.errors import MissingExtraError, UnsupportedError, UsageError

torch = pytest.importorskip("torch", reason="needs the extra calibrate")
peft = pytest.importorskip("peft", reason="needs the extra calibrate")
transformers = pytest.importorskip("transformers", reason="needs the extra calibrate")

from loratools.calibrate.anneal import RankAnnealer, halves, schedule  # noqa: E402 - needs the extra


class Net(torch.nn.Module):  # type: ignore[misc, name-defined]
    """Two layers; the loss is linear in each update, so that its gradient does not depend on the factors."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(12, 10, bias=False), torch.nn.Linear(10, 9, bias=False)
        self.conv = torch.nn.Conv2d(1, 1, 3)

    def forward(self, x: Any = None, labels: Any = None) -> dict[str, Any]:
        y = self.down(self.up(x))
        return {"loss": ((y - (0 if labels is None else labels)) ** 2).mean(), "y": y}


def wrapped(rank: int = 8, **config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        said = {"target_modules": ["up", "down"], "lora_alpha": 12, **config}
        return peft.get_peft_model(Net(), peft.LoraConfig(r=rank, init_lora_weights=False, **said))


def deltas(model: Any) -> dict[str, np.ndarray]:
    found = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight") and m.lora_A}
    return {n: m.get_delta_weight("default").detach().double().numpy() for n, m in found.items()}


def best(d: np.ndarray, k: int) -> np.ndarray:
    u, s, vh = np.linalg.svd(d, full_matrices=False)
    return (u[:, :k] * s[:k]) @ vh[:k]


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"down": 3}},
                                    {"alpha_pattern": {"up": 5}}], ids=str)  # fmt: skip
def test_a_squeeze_is_the_optimal_truncation_and_peft_saves_it(config: dict[str, Any], tmp_path: Path) -> None:
    model = wrapped(**config)
    before, scales = deltas(model), {n: m.scaling["default"] for n, m in model.named_modules() if hasattr(m, "scaling")}
    row = RankAnnealer(4).squeeze(model, 4)
    for name, d in deltas(model).items():
        k = min(4, 3 if "rank_pattern" in config and "down" in name else 4)
        assert np.abs(d - best(before[name], k)).max() <= 1e-5 * np.abs(before[name]).max()  # fp32 factors
    assert {n: m.scaling["default"] for n, m in model.named_modules() if hasattr(m, "scaling")} == scales
    lost = sum(np.linalg.norm(d - best(d, 4)) ** 2 for d in before.values())
    whole = sum(np.linalg.norm(d) ** 2 for n, d in before.items() if not ("rank_pattern" in config and "down" in n))
    assert row["relative_error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    assert (row["rank_before"], row["rank_after"], row["optimizer_state"]) == (8, 4, "none")
    model.save_pretrained(tmp_path / "out")
    again = peft.PeftModel.from_pretrained(Net(), tmp_path / "out")
    adapter = lt.load(tmp_path / "out")
    for name, d in deltas(model).items():
        assert np.allclose(deltas(again)[name], d, atol=1e-6)
        update = adapter[f"{name.removeprefix('base_model.model.')}.weight"]
        direction = getattr(update, "direction", update)
        assert np.allclose(direction.dense(), d, atol=1e-5)  # type: ignore[attr-defined]
    if not config:
        assert model.peft_config["default"].lora_alpha == 6
        assert model.peft_config["default"].rank_pattern == {}


def gradients(model: Any) -> None:
    """Backward of a loss that is linear in both updates: <G, D> for a fixed G."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(3)
    total = 0.0
    for module in model.modules():
        if hasattr(module, "scaling"):
            d = module.scaling["default"] * module.lora_B["default"].weight @ module.lora_A["default"].weight
            total = total + (d * torch.randn(d.shape, generator=generator)).sum()
    total.backward()  # type: ignore[attr-defined]


def factors(model: Any) -> list[Any]:
    return [p for n, p in model.named_parameters() if "lora_" in n]


def test_first_moments_are_the_gradients_of_the_new_channels() -> None:
    model = wrapped()
    optimizer = torch.optim.AdamW(factors(model), lr=0.0, betas=(0.0, 0.0), weight_decay=0.0)  # moments of one gradient
    gradients(model)
    optimizer.step()
    row = RankAnnealer(3).squeeze(model, 3, optimizer)
    assert row["optimizer_state"] == "projected"
    gradients(model)
    assert len(factors(model)) == len(optimizer.state) == 4
    for p in factors(model):
        assert optimizer.state[p]["exp_avg"].shape == p.shape
        assert torch.allclose(optimizer.state[p]["exp_avg"], p.grad, rtol=1e-4, atol=1e-5)
        assert (optimizer.state[p]["exp_avg_sq"] >= 0).all()
        assert float(optimizer.state[p]["step"]) == 1.0


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9), "projected"),
        (lambda ps: torch.optim.AdamW(ps, lr=0.1, amsgrad=True), "projected"),
        (lambda ps: torch.optim.Adagrad(ps, lr=0.1), "reset"),  # sums of squares: another form
        (lambda ps: torch.optim.SGD(ps, lr=0.1), "none"),
    ],
)
def test_training_goes_on_with_the_new_parameters(build: Callable[[Any], Any], told: str) -> None:
    model = wrapped()
    optimizer = build(factors(model))
    gradients(model)
    optimizer.step()
    assert RankAnnealer(2).squeeze(model, 2, optimizer)["optimizer_state"] == told
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in factors(model)}
    before = [p.detach().clone() for p in factors(model)]
    gradients(model)
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(factors(model), before, strict=True))


def test_a_state_can_be_reset() -> None:
    model = wrapped()
    optimizer = torch.optim.AdamW(factors(model), lr=0.1)
    gradients(model)
    optimizer.step()
    assert RankAnnealer(2, optimizer_state="reset").squeeze(model, 2, optimizer)["optimizer_state"] == "reset"
    assert not optimizer.state


def test_an_untrained_update_stays_zero_and_trainable() -> None:
    model = wrapped()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(p)
    RankAnnealer(2).squeeze(model, 2)
    assert all(not d.any() for d in deltas(model).values())
    assert all(bool(p.abs().sum(1).gt(0).all()) for n, p in model.named_parameters() if "lora_A" in n)


def test_schedules() -> None:
    assert list(halves(32, 4)) == [16, 8, 4]
    assert list(halves(32, 5)) == [16, 8, 5]
    assert list(halves(4, 4)) == []
    assert schedule(32, 4, 800, None, None) == {200: 16, 400: 8, 600: 4}
    assert schedule(32, 1, 100, [4, 1], [10, 90]) == {10: 4, 90: 1}
    for wrong in (
        (4, 4, 100, None, None), (4, 8, 100, [8], None), (8, 2, 100, [2, 2], None), (8, 2, 100, [4, 2], [50]),
        (8, 2, 100, [4, 2], [50, 40]), (8, 2, 100, [2], [100]), (8, 2, 100, [2], [0]), (32, 1, 3, None, None),
    ):  # fmt: skip
        with pytest.raises(UsageError):
            schedule(*wrong)
    for options in ({"target": 0}, {"target": 2, "ranks": [4]}, {"target": 2, "ranks": []},
                    {"target": 2, "optimizer_state": "keep"}):  # fmt: skip
        with pytest.raises(UsageError):
            RankAnnealer(**options)


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "loratools.calibrate.anneal")
    with pytest.raises(MissingExtraError) as caught:
        importlib.import_module("loratools.calibrate.anneal")
    assert "loratools[calibrate]" in str(caught.value)


def test_what_is_not_annealed_is_refused() -> None:
    with pytest.raises(UsageError, match="no such PEFT adapter"):
        RankAnnealer(2).squeeze(Net(), 2)
    with pytest.raises(UnsupportedError, match="linear layers") as caught:
        RankAnnealer(2).squeeze(wrapped(target_modules=["up", "conv"]), 2)
    assert "conv" in str(caught.value)


def arguments(folder: Path, steps: int, **more: Any) -> Any:
    return transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
        logging_strategy="no", **more,
    )  # fmt: skip


def test_in_the_trainer(tmp_path: Path) -> None:
    data = [
        {"x": torch.randn(12, generator=torch.Generator().manual_seed(i)), "labels": torch.ones(9)} for i in range(8)
    ]
    model, annealer = wrapped(), lt.RankAnnealer(2)
    trainer = transformers.Trainer(model, arguments(tmp_path, 6, per_device_train_batch_size=4, learning_rate=1e-2),
                                   train_dataset=data, callbacks=[annealer])  # fmt: skip
    trainer.train()
    assert [(row["step"], row["rank_after"], row["optimizer_state"]) for row in annealer.history] == [
        (2, 4, "projected"),
        (4, 2, "projected"),
    ]
    assert model.peft_config["default"].r == 2
    assert sorted({p.shape for p in factors(model)}) == [(2, 10), (2, 12), (9, 2), (10, 2)]
    assert sum("rank_annealer/rank_after" in entry for entry in trainer.state.log_history) == 2
    with pytest.raises(UsageError, match="ranks must fall"):
        transformers.Trainer(model, arguments(tmp_path, 6), train_dataset=data, callbacks=[lt.RankAnnealer(2)]).train()


@pytest.mark.slow
def test_annealed_training_on_the_digits(digits: Path, tmp_path: Path) -> None:
    """From rank 32 down to 4 while learning; the result is a rank-4 adapter that has learned the new digits."""
    spec = importlib.util.spec_from_file_location("digits", digits.parent / "digits.py")
    assert spec is not None
    assert spec.loader is not None
    fixture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fixture)
    fixture.deterministic(threads=1)
    model = fixture.new_adapter(fixture.load_base(), rank=32, seed=2)
    pixels, labels = fixture.images(fixture.NEW, "train")
    data = [{"pixel_values": x, "labels": y} for x, y in zip(pixels, labels, strict=True)]
    annealer = lt.RankAnnealer(4)
    training = arguments(tmp_path / "run", 120, per_device_train_batch_size=32, learning_rate=1e-3, seed=0,
                         lr_scheduler_type="cosine", warmup_steps=12)  # fmt: skip
    transformers.Trainer(model, training, train_dataset=data, callbacks=[annealer]).train()
    assert [row["rank_after"] for row in annealer.history] == [16, 8, 4]
    model.save_pretrained(tmp_path / "adapter")
    torch.use_deterministic_algorithms(False)
    assert fixture.accuracy(fixture.load_adapter(tmp_path / "adapter"), fixture.NEW) > 0.8  # untrained: 0
    adapter = lt.load(tmp_path / "adapter")
    assert {u.rank for u in adapter.values()} == {4}  # type: ignore[attr-defined]
