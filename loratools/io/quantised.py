"""Quantised models: recognised by config and header, and refused with what to do instead."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from loratools.errors import UnsupportedError
from loratools.io.base import Base

_TWIN = re.compile(
    r"[-_.](unsloth-)?(bnb-[48]bit|[48]bit|awq|gptq|gguf|mlx|fp8(-dynamic)?|int[48]|w[48]a(8|16)|q[2-8](_\w+)?)([-_.]|$).*$",
    re.IGNORECASE,
)
_METHODS = {
    "bitsandbytes": "bitsandbytes", "gptq": "GPTQ", "awq": "AWQ", "fp8": "fp8", "fbgemm_fp8": "fp8", "mxfp4": "MXFP4",
    "compressed-tensors": "compressed-tensors", "hqq": "HQQ", "aqlm": "AQLM", "eetq": "EETQ", "quanto": "quanto",
    "torchao": "torchao", "higgs": "HIGGS", "bitnet": "BitNet", "vptq": "VPTQ", "spqr": "SpQR", "modelopt": "ModelOpt",
}  # fmt: skip
FP8 = ("float8_e4m3fn", "float8_e5m2")
SCALES = ("weight_scale_inv", "weight_scale")


def method_of(base: Base) -> str | None:
    """Return how a model is quantised, in words, or None; from its config and its names, shapes and dtypes alone."""
    by_names = next((method for looks, method in _MARKS if looks(base)), None)
    return by_names or _by_config(base)


def refuse_quantised(base: Base, *, model_id: str | None = None, allow_fp8: bool = False) -> str | None:
    """Raise UnsupportedError for a quantised base, naming its unquantised twin where its id tells.

    fp8 with scale tensors passes with ``allow_fp8``. Returns the method that passed, or None for a plain model.
    """
    method = method_of(base)
    if method is None or (method == "fp8" and allow_fp8):
        return method
    known = model_id or str(base.config.get("_name_or_path") or "") or (base.path.name if base.path else "")
    raise UnsupportedError(
        f"the base is quantised ({method}): its weights are codes, and adding an update to them would be wrong",
        file=base.path,
        expected="a base in float32, float16 or bfloat16",
        hint=_hint(method, known),
    )


def refuse_gguf(path: Path) -> None:
    """Raise UnsupportedError for a GGUF file, or a directory whose only weights are GGUF files."""
    files = sorted(path.glob("*.gguf")) if path.is_dir() else [path] if path.suffix == ".gguf" else []
    if not files or (path.is_dir() and (any(path.glob("*.safetensors")) or any(path.glob("*.bin")))):
        return
    raise UnsupportedError(
        "the base is a GGUF file: its weights are codes, and adding an update to them would be wrong",
        file=files[0],
        expected="the safetensors model that the GGUF file was made from",
        hint="apply the adapter to that model and convert the result with llama.cpp's convert_hf_to_gguf.py",
    )


def twin(model_id: str) -> str | None:
    """Return the id of the unquantised model that a quantised one names: ``unsloth/x-bnb-4bit`` -> ``unsloth/x``."""
    owner, slash, name = model_id.rpartition("/")
    plain = _TWIN.sub("", name)
    return f"{owner}{slash}{plain}" if plain and plain != name else None


def scale_of(base: Base, name: str) -> str | None:
    """Return the name of the scale tensor of an fp8 weight, or None."""
    stem = name.removesuffix("weight")
    return next((stem + suffix for suffix in SCALES if stem + suffix in base), None)


def _hint(method: str, model_id: str) -> str:
    plain = twin(model_id)
    again = "quantise the result afterwards" if method != "fp8" else "or pass --requantise to round into fp8 again"
    if plain is None:
        return f"use the unquantised model that it was made from; {again}"
    return f"use {plain} instead (hf download {plain}); {again}"


def _by_config(base: Base) -> str | None:
    said = base.config.get("quantization_config") or base.config.get("compression_config")
    if isinstance(said, dict):
        method = str(said.get("quant_method") or "").lower()
        if not method and (said.get("load_in_4bit") or said.get("load_in_8bit")):
            method = "bitsandbytes"
        return _METHODS.get(method, method) or "an unknown method"
    return (
        "MLX" if isinstance(base.config.get("quantization"), dict) and "bits" in base.config["quantization"] else None
    )


def _ends(*suffixes: str) -> Callable[[Base], bool]:
    return lambda base: any(name.endswith(suffixes) for name in base)


def _mlx(base: Base) -> bool:
    return any(
        _is(base, name, ("uint32",)) and name.removesuffix("weight") + "scales" in base for name in _weights(base)
    )


def _scaled_fp8(base: Base) -> bool:
    return any(_is(base, name, FP8) and scale_of(base, name) is not None for name in _weights(base))


def _int8(base: Base) -> bool:
    return any(_is(base, name, ("int8", "uint8")) for name in _weights(base))


def _weights(base: Base) -> Iterable[str]:
    return (name for name in base if name.endswith("weight"))


def _is(base: Base, name: str, dtypes: tuple[str, ...]) -> bool:
    return base.dtypes[name] in dtypes


_MARKS: tuple[tuple[Callable[[Base], bool], str], ...] = (
    (_ends(".absmax", ".quant_map", ".bitsandbytes__nf4", ".bitsandbytes__fp4"), "bitsandbytes 4-bit"),
    (_ends(".SCB", ".weight_format"), "bitsandbytes 8-bit"),
    (_ends(".g_idx"), "GPTQ"),
    (_ends(".qweight"), "AWQ or GPTQ"),
    (_ends("_blocks"), "MXFP4"),
    (_mlx, "MLX"),
    (_scaled_fp8, "fp8"),
    (_ends(".weight_packed"), "compressed-tensors"),
    (_int8, "8-bit integers"),
)  # fmt: skip
