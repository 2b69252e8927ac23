"""What the linear layers of a model see: second moments of inputs and of gradients, by hooks, streaming.

Layers are those that adapters change: torch's Linear, Conv1D of transformers, and the layer inside one of PEFT's
wrappers. Nothing is kept but sums: vectors in fp64 (they cost nothing, and millions of positive terms add up there
without loss), matrices in fp32, where they are the memory that counts; products of a batch are fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from loratools.errors import MissingExtraError, NumericsError, UsageError
from loratools.io.bundle import memory_leaf
from loratools.io.stats import Collected, Stats

_WRAPPED = "base_layer"
_PREFIX = "base_model.model."
_INSIDE = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "modules_to_save")


def collect_stats(
    model: Any,
    batches: Iterable[Any],
    *,
    gram: bool = False,
    gradients: bool = False,
    modules: Collection[str] | Callable[[str], bool] | None = None,
) -> Collected:
    """Run ``batches`` through a torch model and return the statistics of its linear layers.

    A batch is a mapping of the model's keyword arguments, or whatever it takes as its only argument. ``in_diag`` is
    collected, with ``gram`` the whole ``in_gram`` (n, n) in its place; with ``gradients`` also ``out_diag``, for which
    the model must return a loss (its batches hold labels). ``modules`` are names, or a function of the name, of the
    layers wanted (default: all). Padding that a batch's ``attention_mask`` marks is left out. Names are those of the
    model without PEFT's wrappers. The model's mode, gradients and hooks are left as they were; it runs in its own mode,
    so call ``model.eval()`` first to leave dropout out.

    Cost: the forward passes and 2 n^2 per input and layer with ``gram``; memory 4 n^2 bytes per layer then. The result
    does not depend on how inputs are batched, up to fp32 rounding. Raises UsageError without batches or layers, or
    without a loss; NumericsError for inputs that are not finite; MissingExtraError without torch.
    """
    _torch()
    layers = dict(_layers(model, modules))
    if not layers:
        raise UsageError("the model has no linear layer of these names", hint="see model.named_modules()")
    sums = {name: _Sums(gram=gram) for name in layers}
    mask: list[Any] = [None]
    with _hooked(layers, sums, mask, gradients), _frozen(model, gradients):
        count = 0
        for batch in batches:
            mask[0] = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            _run(model, batch, gradients)
            count += 1
    if not count:
        raise UsageError("no batches to collect statistics from")
    found = {name: one.stats(name) for name, one in sums.items() if one.inputs}
    if not found:
        raise UsageError("none of the layers was used by these batches")
    return Collected(found)


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise MissingExtraError(
            "collecting statistics needs torch", hint="pip install 'loratools[calibrate]'"
        ) from None
    return torch


def _layers(model: Any, wanted: Collection[str] | Callable[[str], bool] | None) -> Iterator[tuple[str, Any]]:
    """Yield (name without wrappers, layer)."""
    torch = _torch()
    for path, layer in model.named_modules():
        parts = path.removeprefix(_PREFIX).split(".")
        if any(part in _INSIDE for part in parts):
            continue
        name = ".".join(part for part in parts if part != _WRAPPED)
        if not isinstance(layer, torch.nn.Linear) and type(layer).__name__ != "Conv1D":
            continue
        if wanted is None or (wanted(name) if callable(wanted) else name in wanted):
            yield name, layer


@contextmanager
def _hooked(layers: Mapping[str, Any], sums: Mapping[str, _Sums], mask: list[Any], gradients: bool) -> Iterator[None]:
    handles = []
    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_pre_hook(_see(sums[name], mask)))
            if gradients:
                handles.append(layer.register_forward_hook(_feel(sums[name], mask)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _see(sums: _Sums, mask: list[Any]) -> Callable[..., None]:
    def hook(layer: Any, args: tuple[Any, ...]) -> None:
        sums.add_inputs(_rows(args[0].detach(), mask[0]))

    return hook


def _feel(sums: _Sums, mask: list[Any]) -> Callable[..., None]:
    """Return a hook that asks the output for its gradient; where the graph has not begun yet it begins here."""

    def hook(layer: Any, args: tuple[Any, ...], output: Any) -> Any:
        seen = mask[0]
        begun = output.requires_grad
        output.requires_grad_(True)
        output.register_hook(lambda g: sums.add_gradients(_rows(g.detach(), seen)))
        return output if begun else output.clone()  # what follows may work in place

    return hook


def _rows(x: Any, mask: Any) -> Any:
    """Return x (..., n) as rows (count, n); what an attention mask of its leading axes marks as padding is left out."""
    if mask is not None and tuple(mask.shape) == tuple(x.shape[:-1]):
        return x[mask.to(device=x.device).bool()]
    return x.reshape(-1, x.shape[-1])


@contextmanager
def _frozen(model: Any, gradients: bool) -> Iterator[None]:
    """Run without gradients, or with gradients of activations alone: the parameters' own stay as they were."""
    torch = _torch()
    if not gradients:
        with torch.no_grad():
            yield
        return
    asked = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in asked:
            p.requires_grad_(False)  # gradients of activations need none of the parameters'
        with torch.enable_grad():
            yield
    finally:
        for p, before in asked:
            p.requires_grad_(before)


def _run(model: Any, batch: Any, gradients: bool) -> None:
    try:
        output = model(**batch) if isinstance(batch, Mapping) else model(batch)
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        raise UsageError(
            "the model cannot run on these inputs", got=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}",
            expected=f"what {type(model).__name__} takes",
        ) from error  # fmt: skip
    if not gradients:
        return
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise UsageError("the model returned no loss, which gradients start from", hint="put labels into the batches")
    loss.backward()


class _Sums:
    """Running sums of one layer."""

    def __init__(self, *, gram: bool) -> None:
        self.gram = gram
        self.inputs = self.outputs = 0
        self.seen: Any = 0.0
        self.felt: Any = 0.0

    def add_inputs(self, rows: Any) -> None:
        """Add inputs (count, n)."""
        x = rows.float()
        self.seen = self.seen + (x.mT @ x if self.gram else x.square().double().sum(0))
        self.inputs += x.shape[0]

    def add_gradients(self, rows: Any) -> None:
        """Add gradients of outputs (count, m)."""
        self.felt = self.felt + rows.double().square().sum(0)
        self.outputs += rows.shape[0]

    def stats(self, name: str) -> Stats:
        """Return the means, on the CPU."""
        seen, felt = self.seen / self.inputs, self.felt / max(self.outputs, 1)
        for value in (seen, felt) if self.outputs else (seen,):
            if not bool(value.isfinite().all()):
                raise NumericsError("the layer saw values that are not finite", parameter=name)
        inputs = memory_leaf(name, seen.cpu().numpy())
        outputs = memory_leaf(name, felt.cpu().numpy()) if self.outputs else None
        return Stats(None if self.gram else inputs, inputs if self.gram else None, outputs)
