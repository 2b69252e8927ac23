"""Torch pickles (.bin, .pt, .ckpt), read by torch's restricted unpickler only: nothing in the file is ever executed."""

from __future__ import annotations

import re
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from loratools.errors import FormatError, LoratoolsError, MissingExtraError, UnsupportedError
from loratools.io.dtypes import dtype_name, frozen, to_numpy
from loratools.io.oserrors import os_errors
from loratools.io.zips import zip_is_plain
from loratools.leaf import ITEMSIZE, Leaf

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_TRAINING = ("optimizer", "optimizer_state_dict", "lr_scheduler", "scheduler", "scaler")  # beside a wrapper: not read
LEFT_OUT = "loratools.training_state"
_SAFE_TORCH = (2, 6)  # earlier versions of the restricted unpickler could be made to run code (CVE-2025-32434)
_BOILERPLATE = ("Weights only load failed", "Check the documentation", "In PyTorch")
# A damaged pickle may fail anywhere in the unpickler or in the rebuilding of a tensor.
_DAMAGE = (
    UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, AssertionError,
    ArithmeticError, ImportError, struct.error,
)  # fmt: skip


def read_pickle(path: Path, *, zipped: bool) -> tuple[dict[str, Leaf], dict[str, str]]:
    """Return a leaf per tensor and the plain values beside them (as text).

    The tensors may lie under one of ``state_dict``, ``model_state_dict``, ``model``, ``module``, beside which the state
    of an optimizer is left out, and named among the plain values; a plain list becomes ``"0"``, ``"1"``, .... Raises
    MissingExtraError without torch, FormatError for a global that the restricted unpickler refuses and for content that
    is neither tensors nor plain values.
    """
    mappable = zipped and zip_is_plain(path)
    try:
        torch = _import_torch()
        bag, metadata = _unwrap(_load(torch, path, mappable), torch)
        return {name: _leaf(name, tensor, torch) for name, tensor in bag.items()}, metadata
    except LoratoolsError as error:
        raise error.at(file=path) from error.__cause__


def _import_torch() -> Any:
    try:
        import torch
    except ImportError:
        raise MissingExtraError(
            "reading torch .bin/.pt files needs torch", hint="pip install 'loratools[torch]', or convert to safetensors"
        ) from None
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < _SAFE_TORCH:
        raise MissingExtraError(
            "this torch cannot read pickles safely",
            expected="torch >= 2.6",
            got=torch.__version__,
            hint="pip install --upgrade torch",
        )
    return torch


def _load(torch: Any, path: Path, mappable: bool) -> Any:
    try:
        with os_errors("read the file", path), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch on protocols and deprecations: nothing the user can act on
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mappable or None)
    except _DAMAGE as error:
        if isinstance(error, LoratoolsError):
            raise
        raise _refusal(str(error) or type(error).__name__) from None


def _refusal(message: str) -> FormatError:
    """The restricted unpickler refused a global, or the file is damaged."""
    found = re.search(r"(?:GLOBAL|Unsupported class|Unsupported global: GLOBAL) ([\w.]+)", message)
    if found:
        return FormatError(
            "the pickle asks for code, not only for tensors; nothing was executed",
            expected="tensors and plain values",
            got=found[1],
            hint="do not load this file unless you trust its author; ask for a safetensors file",
        )
    said = [line for line in message.splitlines() if line.strip() and not line.startswith(_BOILERPLATE)]
    return FormatError(
        "the torch file cannot be unpickled; nothing was executed",
        got=said[-1][:200] if said else message[:200],
        hint="the file is damaged or cut short: download or copy it again",
    )


def _unwrap(held: Any, torch: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the one bag of tensors in what was unpickled, and the plain values beside it."""
    if isinstance(held, list | tuple):
        held = {str(i): value for i, value in enumerate(held)}
        _refuse_others({k: v for k, v in held.items() if not isinstance(v, torch.Tensor)})
    if not isinstance(held, Mapping):
        raise FormatError("the torch file holds no state dict", expected="tensors by name", got=type(held).__name__)
    wrapped = [name for name in _WRAPPERS if isinstance(held.get(name), Mapping)]
    loose = any(isinstance(value, torch.Tensor) for value in held.values())
    if len(wrapped) > 1 or (wrapped and loose):
        names = ", ".join([*wrapped, *(["tensors beside them"] if loose else [])])
        raise FormatError("several state dicts in one file: which one is meant is not clear", got=names)
    if not wrapped:
        return _split(held, torch)
    outer, inner = {name: value for name, value in held.items() if name != wrapped[0]}, held[wrapped[0]]
    if both := set(outer) & set(inner):
        raise FormatError(f"names occur inside and beside {wrapped[0]!r}", got=", ".join(sorted(map(str, both))))
    training = [name for name in _TRAINING if isinstance(outer.get(name), Mapping)]
    tensors, plain = _split({**inner, **{k: v for k, v in outer.items() if k not in training}}, torch)
    return tensors, plain | ({LEFT_OUT: ", ".join(training)} if training else {})


def _split(held: Mapping[Any, Any], torch: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Separate tensors from plain values; anything else is an error that lists it."""
    tensors = {name: value for name, value in held.items() if isinstance(value, torch.Tensor)}
    plain = {name: value for name, value in held.items() if isinstance(value, str | int | float)}
    _refuse_others({k: v for k, v in held.items() if k not in tensors and k not in plain})
    odd = [name for name in (*tensors, *plain) if not isinstance(name, str)]
    if odd:
        raise FormatError("names of tensors are not text", got=", ".join(repr(name) for name in odd[:3]))
    return tensors, {name: str(value) for name, value in plain.items()}


def _refuse_others(others: Mapping[Any, Any]) -> None:
    if others:
        shown = ", ".join(f"{name} ({type(value).__name__})" for name, value in list(others.items())[:5])
        raise FormatError(
            f"{len(others)} entries of the torch file are no tensors",
            expected="tensors by name, with plain text and numbers beside them",
            got=shown,
            hint="save the state dict of the adapter alone, as safetensors",
        )


def _leaf(name: str, tensor: Any, torch: Any) -> Leaf:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        kind = f"{tensor.layout}, {tensor.dtype}, {tensor.device.type}"
        raise UnsupportedError(f"tensor {name!r} is not a plain dense tensor", expected="torch.strided", got=kind)
    held = tensor.detach()
    try:
        dtype = dtype_name(held)
    except FormatError as error:
        raise error.at(parameter=name) from None
    if held.numel() * ITEMSIZE[dtype] > held.untyped_storage().nbytes():
        raise FormatError(
            f"tensor {name!r} is larger than what is stored of it",
            got=f"shape {tuple(held.shape)}, strides {held.stride()}",
            hint="save a contiguous copy of it",
        )
    return Leaf(tuple(held.shape), dtype, lambda out: frozen(to_numpy(held)))
