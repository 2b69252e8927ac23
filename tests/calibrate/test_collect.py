"""Statistics of a model's layers against sums over everything at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratools as lt
from loratools.errors import NumericsError, UsageError
from loratools.io.stats import Collected

torch = pytest.importorskip("torch", reason="needs torch")


class Net(torch.nn.Module):  # type: ignore[misc, name-defined]
    """Two layers and a loss; the second is used twice."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.second = torch.nn.Linear(6, 5), torch.nn.Linear(5, 5)
            self.unused = torch.nn.Linear(3, 3)

    def forward(self, x: Any, labels: Any = None, attention_mask: Any = None) -> dict[str, Any]:
        h = torch.nn.functional.relu(self.first(x), inplace=True)
        y = self.second(self.second(h))
        return {"y": y} if labels is None else {"y": y, "loss": ((y - labels) ** 2).sum()}


def inputs(count: int = 12) -> Any:
    return torch.randn(count, 4, 6, generator=torch.Generator().manual_seed(1))


def value(leaf: Any) -> np.ndarray:
    assert leaf is not None
    return np.asarray(leaf.read(), np.float64)


def test_second_moments_of_inputs_however_they_are_batched() -> None:
    net, x = Net(), inputs()
    rows = x.reshape(-1, 6).double().numpy()
    for size in (1, 5, 12):
        found = lt.collect_stats(net, ({"x": part} for part in x.split(size)))
        assert isinstance(found, Collected)
        assert list(found) == ["first", "second"]
        assert np.allclose(value(found["first"].in_diag), (rows**2).mean(0), rtol=1e-6)
        assert found["first"].in_gram is None
        assert found["first"].out_diag is None
    found = lt.collect_stats(net, [{"x": x}], gram=True)
    assert np.allclose(value(found["first"].in_gram), rows.T @ rows / len(rows), atol=1e-6)
    h = torch.relu(net.first(x))
    both = torch.cat([h, net.second(h)]).reshape(-1, 5).detach().double().numpy()
    assert np.allclose(value(found["second"].in_gram), both.T @ both / len(both), atol=1e-6)


def test_gradients_of_outputs_and_nothing_left_behind() -> None:
    net, x = Net(), inputs()
    net.first.weight.grad = torch.ones_like(net.first.weight)
    net.second.bias.requires_grad_(False)
    batch = {"x": x, "labels": torch.zeros(12, 4, 5)}
    found = lt.collect_stats(net, [batch], gradients=True)
    assert torch.equal(net.first.weight.grad, torch.ones_like(net.first.weight))
    assert net.second.weight.grad is None
    assert not net.second.bias.requires_grad
    assert not net.first._forward_hooks
    assert not net.first._forward_pre_hooks
    h = net.first(x)
    h.retain_grad()
    y = net.second(net.second(torch.relu(h)))
    (y**2).sum().backward()
    want = (h.grad.reshape(-1, 5).double() ** 2).mean(0).numpy()
    assert np.allclose(value(found["first"].out_diag), want, rtol=1e-5)
    with pytest.raises(UsageError, match="no loss"):
        lt.collect_stats(net, [{"x": x}], gradients=True)


def test_padding_is_left_out() -> None:
    x, mask = inputs(), torch.ones(12, 4)
    mask[:, 3] = 0
    found = lt.collect_stats(Net(), [{"x": x, "attention_mask": mask}])
    rows = x[:, :3].reshape(-1, 6).double().numpy()
    assert np.allclose(value(found["first"].in_diag), (rows**2).mean(0), rtol=1e-6)


def test_modules_can_be_chosen() -> None:
    assert list(lt.collect_stats(Net(), [inputs()], modules=["second"])) == ["second"]
    assert list(lt.collect_stats(Net(), [inputs()], modules=lambda name: name.startswith("f"))) == ["first"]
    with pytest.raises(UsageError, match="no linear layer"):
        lt.collect_stats(Net(), [inputs()], modules=["third"])
    with pytest.raises(UsageError, match="no batches"):
        lt.collect_stats(Net(), [])
    with pytest.raises(UsageError, match="none of the layers was used"):
        lt.collect_stats(Net(), [inputs()], modules=["unused"])


def test_values_that_are_not_finite_are_refused() -> None:
    x = inputs()
    x[0, 0, 0] = float("nan")
    with pytest.raises(NumericsError, match="not finite") as caught:
        lt.collect_stats(Net(), [x])
    assert caught.value.parameter == "first"


def test_long_sums_lose_nothing() -> None:
    """A large first batch and thousands of small ones: fp32 sums would swallow these."""
    layer = torch.nn.Sequential(torch.nn.Linear(1, 1))
    batches = [torch.full((1, 1), 4096.0), *[torch.full((1, 1), 0.5)] * 3000]
    found = lt.collect_stats(layer, batches)
    assert value(found["0"].in_diag)[0] == pytest.approx((4096.0**2 + 3000 * 0.25) / 3001, rel=1e-12)


def test_half_precision_is_summed_in_fp32() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2)).half()
    found = lt.collect_stats(layer, [torch.full((1, 2), 1000.0).half()])  # its square is beyond fp16
    assert np.allclose(value(found["0"].in_diag), 1e6)


def test_peft_models_have_the_names_of_their_base(digits: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = torch.nn.Sequential(torch.nn.Linear(6, 5))
    x = inputs()
    plain = lt.collect_stats(base, [x])
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"]))
    found = lt.collect_stats(wrapped, [x])
    assert list(found) == list(plain) == ["0"]
    assert np.array_equal(value(found["0"].in_diag), value(plain["0"].in_diag))
    out = lt.save_stats(found, tmp_path / "stats.safetensors")
    assert list(lt.load_stats(out)) == ["0"]


def test_statistics_squeeze_better_where_they_were_collected() -> None:
    """Weighted by the inputs, the outputs on these very inputs are the best of that rank."""
    net, x = Net(), inputs() * torch.tensor([10, 1, 1, 1, 1, 0.1])
    stats = lt.collect_stats(net, [x], gram=True)
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((4, 6)).astype("f4"), rng.standard_normal((5, 4)).astype("f4")
    tensors = {"base_model.model.first.lora_A.weight": a, "base_model.model.first.lora_B.weight": b}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["first"]}
    adapter = lt.from_state_dict(tensors, config)
    rows = x.reshape(-1, 6).double().numpy()

    def error(small: Any) -> float:
        d = adapter["first.weight"].dense() - small["first.weight"].dense()  # type: ignore[attr-defined]
        return float(np.linalg.norm(rows @ d.T))

    assert error(lt.squeeze(adapter, rank=1, stats=stats)) < error(lt.squeeze(adapter, rank=1))
