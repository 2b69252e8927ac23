"""Textbook functions that a fused kernel may replace.

``@accelerable`` marks the reference; a kernel registers with ``@fuses(reference, when=predicate)``. Kernels are
imported on the first call that meets an accelerator tensor (or under ``force``). ``LORATOOLS_KERNELS``: ``auto``
(default), ``off``, ``force`` (an error when nothing fused accepts, so that a test never compares the reference with
itself). A kernel that raises is an error that names it: there is no silent fallback. Where torch or Triton is not
installed there are no kernels; :func:`missing` says so, ``auto`` keeps to the reference and ``force`` is an error.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from loratools.errors import KernelError, LoratoolsError, MissingExtraError, UsageError

F = TypeVar("F", bound=Callable[..., Any])
Kernel = tuple[str, Callable[..., bool], Callable[..., Any]]
_MODES = ("auto", "off", "force")
_NEEDED = ("torch", "triton")
_kernels: dict[str, list[Kernel]] = {}


def mode() -> str:
    """Return the value of ``LORATOOLS_KERNELS`` (default ``auto``); an unknown value is a :class:`UsageError`."""
    value = os.environ.get("LORATOOLS_KERNELS", "auto")
    if value not in _MODES:
        raise UsageError("LORATOOLS_KERNELS has an unknown value", expected="|".join(_MODES), got=value)
    return value


def accelerable(reference: F) -> F:
    """Mark a textbook function as replaceable by a kernel; without torch in the process the cost is one lookup."""
    name = f"{reference.__module__}.{reference.__qualname__}"
    _kernels.setdefault(name, [])

    @functools.wraps(reference)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not considered(*args):
            return reference(*args, **kwargs)
        return _call_fused(name, reference, args, kwargs)

    return call  # type: ignore[return-value]


def considered(*args: Any) -> bool:
    """Tell whether kernels are looked at for these arguments: never when ``off``, always under ``force``."""
    chosen = mode()
    return chosen == "force" or (chosen == "auto" and _has_accelerator(args))


def fuses(reference: Callable[..., Any], when: Callable[..., bool]) -> Callable[[F], F]:
    """Register the decorated kernel for ``reference``; ``when`` sees the arguments and must be cheap."""
    name = f"{reference.__module__}.{reference.__qualname__}"

    def register(kernel: F) -> F:
        _kernels[name].append((f"{kernel.__module__}.{kernel.__qualname__}", when, kernel))
        return kernel

    return register


def table() -> dict[str, tuple[str, ...]]:
    """Return every accelerable function and the kernels registered for it (kernels are loaded first)."""
    _load()
    return {name: tuple(kernel for kernel, _, _ in found) for name, found in sorted(_kernels.items())}


def conditions() -> dict[str, str]:
    """Return kernel -> what it takes, in the words of its predicate."""
    _load()
    every = [kernel for found in _kernels.values() for kernel in found]
    said = {name: (when.__doc__ or "").strip().splitlines()[0] for name, when, _ in every}
    return {name: line.removeprefix("True for ").rstrip(".") for name, line in said.items()}


def accelerator() -> str | None:
    """Return the name of the GPU that torch would use, ``interpreter`` where Triton interprets, None without either."""
    if missing():
        return None
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return "interpreter" if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on") else None


@functools.cache
def missing() -> tuple[str, ...]:
    """Return those of the packages that kernels are written with which are not installed."""
    from importlib.util import find_spec

    return tuple(name for name in _NEEDED if find_spec(name) is None)


def _call_fused(name: str, reference: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    _load()
    for kernel, when, body in _kernels[name]:
        if when(*args, **kwargs):
            return _run(kernel, body, args, kwargs)
    if mode() == "force":
        if missing():
            raise MissingExtraError(f"kernels need {' and '.join(missing())}", hint="pip install 'loratools[gpu]'")
        raise KernelError(f"no kernel accepts these arguments of {name}", hint="set LORATOOLS_KERNELS=auto")
    return reference(*args, **kwargs)


def _run(kernel: str, body: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a kernel; what it finds wrong with the input passes as it is, anything else is the kernel's own failure."""
    try:
        return body(*args, **kwargs)
    except LoratoolsError:
        raise
    except Exception as error:
        raise KernelError(f"kernel {kernel} failed: {error}", hint="run again with LORATOOLS_KERNELS=off") from error


@functools.cache
def _load() -> None:
    """Import every module of the kernels' package, once; nothing where what they need is not installed."""
    import importlib
    import pkgutil

    if missing():
        return
    package = importlib.import_module("loratools.kernels")
    for module in pkgutil.iter_modules(package.__path__, "loratools.kernels."):
        importlib.import_module(module.name)


def _has_accelerator(args: Any) -> bool:
    """True if the first array among the arguments (or in the first nested list) is a torch tensor off the CPU."""
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    tensors = (x for x in map(_first, args) if isinstance(x, torch.Tensor))
    return any(x.device.type != "cpu" for x in tensors)


def _first(arg: Any) -> Any:
    """Return the first element of nested lists and tuples; of an operator, the array that says where it lives."""
    if isinstance(arg, list | tuple) and arg:
        return _first(arg[0])
    return getattr(arg, "like", arg)
