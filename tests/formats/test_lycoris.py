"""LyCORIS' own modules, forward: our deltas equal theirs, with and without a magnitude."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from loratools.formats.base import FORMATS
from loratools.io.bundle import from_memory
from loratools.linalg.namespace import to_numpy

torch = pytest.importorskip("torch", reason="torch is not installed")
lycoris = pytest.importorskip("lycoris.modules", reason="lycoris-lora is not installed")

LINEAR = {"in_features": 24, "out_features": 36, "bias": False}
CONV = {"in_channels": 8, "out_channels": 12, "kernel_size": 3, "bias": False}
CASES = {
    "locon-linear": ("LoConModule", "linear", {}),
    "locon-conv": ("LoConModule", "conv", {}),
    "tucker": ("LoConModule", "conv", {"use_tucker": True}),
    "loha-linear": ("LohaModule", "linear", {}),
    "loha-conv": ("LohaModule", "conv", {}),
    "loha-tucker": ("LohaModule", "conv", {"use_tucker": True}),
    "lokr-w2-factored": ("LokrModule", "linear", {"factor": 4}),
    "lokr-both-factored": ("LokrModule", "linear", {"factor": 6, "decompose_both": True, "lora_dim": 2}),
    "lokr-full": ("LokrModule", "linear", {"full_matrix": True, "factor": 4}),
    "lokr-conv": ("LokrModule", "conv", {"factor": 2}),
    "lokr-tucker": ("LokrModule", "conv", {"factor": 2, "use_tucker": True, "lora_dim": 1}),
    "full": ("FullModule", "linear", {}),
}


def build(case: str, **more: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Return the layer, the LyCORIS module on it, and its state under kohya's names."""
    cls, kind, options = CASES[case]
    torch.manual_seed(3)
    layer = torch.nn.Linear(**LINEAR) if kind == "linear" else torch.nn.Conv2d(**CONV)
    settings = {"lora_dim": 3, "alpha": 2.0, **options, **more}
    if cls == "FullModule":
        settings = {}
    module = getattr(lycoris, cls)("lora_unet_layer", layer, 1.0, **settings)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    module.eval()
    if cls == "FullModule":  # its state dict is only a difference once it is applied
        return layer, module, {"lora_unet_layer.diff": np.array(module.weight.detach().numpy())}
    return layer, module, {f"lora_unet_layer.{k}": np.array(v.detach().numpy()) for k, v in module.state_dict().items()}


def forward(layer: Any, module: Any, kind: str) -> Any:
    x = torch.randn(5, 24) if kind == "linear" else torch.randn(2, 8, 6, 6)
    before = layer(x)
    module.apply_to()
    try:
        return x, before, layer(x)
    finally:
        module.restore()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("how", ["plain", "dora-out", "dora-in", "rslora", "scalar"])
def test_deltas_are_those_of_the_module(case: str, how: str) -> None:
    cls, kind, _ = CASES[case]
    if cls == "FullModule" and how != "plain":
        pytest.skip("full differences have no such option")
    if how == "dora-in" and case in ("loha-conv", "lokr-conv"):
        pytest.skip("a flattened kernel with a magnitude over the input axis is refused without the base's shape")
    if how == "rslora" and case in ("lokr-full", "lokr-conv"):
        pytest.skip("LyCORIS forgets the scale of two full factors on saving: its own loader applies 1, as we do")
    more: dict[str, Any] = {}
    if how.startswith("dora"):
        more = {"weight_decompose": True, "wd_on_out": how == "dora-out"}
    elif how == "rslora":
        more = {"rs_lora": True}
    elif how == "scalar":
        more = {"use_scalar": True}
    layer, module, state = build(case, **more)
    with torch.no_grad():
        x, _, wanted = forward(layer, module, kind)
        shape = {"layer.weight": layer.weight.detach().numpy()}
        from loratools.io.base import Base

        format = FORMATS["kohya"] if FORMATS["kohya"].declines(from_memory(state)) is None else FORMATS["lycoris"]
        assert format.declines(from_memory(state)) is None
        adapter = format.decode(from_memory(state), base=Base.open({"layer.weight": shape["layer.weight"]}))
        (update,) = adapter.values()
        w = torch.from_numpy(np.array(update.apply(shape["layer.weight"])))
        got = torch.nn.functional.linear(x, w) if kind == "linear" else torch.nn.functional.conv2d(x, w)
    assert (got - wanted).abs().max() <= 2e-5 * wanted.abs().max()  # fp32, and LyCORIS' epsilon of 1.2e-7 in norms


@pytest.mark.parametrize("case", CASES)
def test_a_file_is_written_as_it_was(case: str) -> None:
    _, _, state = build(case)
    bundle = from_memory(state)
    name = "lycoris" if FORMATS["lycoris"].declines(bundle) is None else "kohya"
    again = FORMATS[name].encode(FORMATS[name].decode(bundle))
    assert {k: to_numpy(t).tobytes() for k, t in again.tensors.items()} == {
        k: to_numpy(t).tobytes() for k, t in bundle.tensors.items()
    }
    assert {k: tuple(t.shape) for k, t in again.tensors.items()} == {k: t.shape for k, t in bundle.tensors.items()}
