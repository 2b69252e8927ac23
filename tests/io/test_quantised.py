from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from loratools.errors import UnsupportedError
from loratools.io.base import Base
from loratools.io.quantised import method_of, refuse_gguf, refuse_quantised, twin

ONE, CODES = np.ones(1, np.float32), np.zeros((2, 4), np.uint8)
FP8 = np.ones((2, 4), ml_dtypes.float8_e4m3fn)
NAMES: dict[str, tuple[dict[str, Any], str]] = {
    "bnb 4": (
        {"q.weight": CODES, "q.weight.absmax": ONE, "q.weight.quant_state.bitsandbytes__nf4": CODES},
        "bitsandbytes 4-bit",
    ),
    "bnb 8": ({"q.weight": CODES.view(np.int8), "q.SCB": ONE}, "bitsandbytes 8-bit"),
    "gptq": ({"q.qweight": CODES.view(np.int32), "q.qzeros": ONE, "q.scales": ONE, "q.g_idx": ONE}, "GPTQ"),
    "awq": ({"q.qweight": CODES.view(np.int32), "q.qzeros": ONE, "q.scales": ONE}, "AWQ or GPTQ"),
    "mlx": ({"q.weight": CODES.view(np.uint32), "q.scales": ONE, "q.biases": ONE}, "MLX"),
    "mxfp4": ({"m.experts.down_proj_blocks": CODES, "m.experts.down_proj_scales": CODES}, "MXFP4"),
    "fp8": ({"q.weight": FP8, "q.weight_scale_inv": ONE}, "fp8"),
    "int8": ({"q.weight": CODES.view(np.int8)}, "8-bit integers"),
}
CONFIGS = {
    "GPTQ": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "bitsandbytes": {"quantization_config": {"load_in_4bit": True}},
    "MLX": {"quantization": {"bits": 4, "group_size": 64}},
    "fp8": {"quantization_config": {"quant_method": "fp8"}},
    "an unknown method": {"quantization_config": {"bits": 4}},
}


def base(tensors: dict[str, Any], config: dict[str, Any] | None = None) -> Base:
    opened = Base.open(tensors)
    opened.config = config or {}
    return opened


@pytest.mark.parametrize("case", NAMES)
def test_recognised_by_names_and_dtypes(case: str) -> None:
    tensors, method = NAMES[case]
    assert method_of(base(tensors)) == method
    with pytest.raises(UnsupportedError, match="quantised"):
        refuse_quantised(base(tensors))


@pytest.mark.parametrize("method", CONFIGS)
def test_recognised_by_config(method: str) -> None:
    assert method_of(base({"q.weight": np.ones((2, 4), np.float16)}, CONFIGS[method])) == method


def test_plain_models_pass() -> None:
    plain = base({"q.weight": np.ones((2, 4), np.float16), "q.scales": ONE, "mask": CODES}, {"quantization": None})
    assert refuse_quantised(plain) is None
    assert refuse_quantised(base(NAMES["fp8"][0]), allow_fp8=True) == "fp8"


@pytest.mark.parametrize(
    ("quantised", "plain"),
    [
        ("unsloth/llama-3-8b-bnb-4bit", "unsloth/llama-3-8b"),
        ("unsloth/Qwen3-4B-unsloth-bnb-4bit", "unsloth/Qwen3-4B"),
        ("TheBloke/Mistral-7B-v0.1-GPTQ", "TheBloke/Mistral-7B-v0.1"),
        ("x/y-AWQ-INT4", "x/y"),
        ("mlx-community/Llama-3.2-1B-4bit", "mlx-community/Llama-3.2-1B"),
        ("neuralmagic/X-FP8-dynamic", "neuralmagic/X"),
        ("meta-llama/Llama-3.1-8B", None),
    ],
)
def test_twins(quantised: str, plain: str | None) -> None:
    assert twin(quantised) == plain


def test_the_twin_is_named() -> None:
    with pytest.raises(UnsupportedError) as caught:
        refuse_quantised(base(NAMES["bnb 4"][0], {"_name_or_path": "unsloth/llama-3-8b-bnb-4bit"}))
    assert "hf download unsloth/llama-3-8b)" in str(caught.value.hint)


def test_gguf(tmp_path: Path) -> None:
    (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")
    for path in (tmp_path, tmp_path / "model-q4.gguf"):
        with pytest.raises(UnsupportedError, match="GGUF"):
            refuse_gguf(path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    refuse_gguf(tmp_path)
