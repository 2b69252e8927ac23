"""RankAnnealer: LoRA-Squeeze during training, as a callback of transformers' Trainer with a PEFT LoRA.

Training begins at a high rank and is squeezed to lower ones in stages of equal length (In-Squeeze of LoRA-Squeeze,
arXiv:2602.10993; its stages have at least 200 steps each). Every squeeze is the optimal truncation of each update at an
unchanged scale s: alpha follows the rank. The paper does not say what becomes of the optimizer's state; here it is
carried by projection or reset, and the history says which.

Projection. Old factors b, a become b M and N a. Since dL/da' = M^T dL/da and dL/db' = dL/db N^T for gradients at the
same update, first moments follow exactly: M^T m_a and m_b N^T. Second moments of mixed channels need covariances that
no optimizer keeps; taking channels as uncorrelated, (M o M)^T v_a and v_b (N o N)^T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import sqrt
from typing import Any, Literal, NamedTuple

from loratools.calibrate.patterns import say_ranks
from loratools.errors import MissingExtraError, UnsupportedError, UsageError
from loratools.kinds.lowrank import LowRank, padded
from loratools.linalg import weighted
from loratools.linalg.namespace import up
from loratools.linalg.select import tail_error
from loratools.linalg.weighted import Weights

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise MissingExtraError(f"RankAnnealer needs {error.name}", hint="pip install 'loratools[calibrate]'") from None

LINEAR = ("exp_avg", "momentum_buffer")
SQUARED = ("exp_avg_sq", "max_exp_avg_sq")
_VARIANTS = ("DoraLinearVariant", "ALoraLinearVariant")


class Cut(NamedTuple):
    """One layer's update before a squeeze, |D|, and the relative error of the squeeze."""

    norm: float
    error: float


class RankAnnealer(TrainerCallback):  # type: ignore[misc]  # Any where transformers is not installed
    """Squeeze a PEFT LoRA in stages while it trains, down to ``target`` channels.

    ``ranks`` are the ranks of the stages after the first (descending, the last one is ``target``), by default halves of
    the starting rank; ``steps`` the global steps after which these squeezes happen, by default stages of equal length.
    ``optimizer_state``: ``project`` carries Adam's moments (SGD's momentum) into the new channels, ``reset`` begins
    anew; a state of another form is reset. ``history`` has one row per squeeze: step, rank_before, rank_after,
    relative_error, optimizer_state (projected, reset, or none where there was none); the Trainer's log has it too.

    Raises UsageError for a schedule that does not fit the training, UnsupportedError for layers other than linear ones
    and for training in several processes (which hold the old parameters), both before the first step.
    """

    def __init__(
        self,
        target: int,
        *,
        ranks: Sequence[int] | None = None,
        steps: Sequence[int] | None = None,
        optimizer_state: Literal["project", "reset"] = "project",
        adapter_name: str = "default",
    ) -> None:
        if target < 1 or (ranks is not None and (not ranks or ranks[-1] != target)):
            raise UsageError("the last stage has the target rank", expected=f"ranks ending in {target}", got=ranks)
        if optimizer_state not in ("project", "reset"):
            raise UsageError("no such treatment of the optimizer", expected="project or reset", got=optimizer_state)
        self.target, self.ranks, self.steps = target, ranks, steps
        self.optimizer_state, self.adapter_name = optimizer_state, adapter_name
        self.plan: dict[int, int] = {}
        self.history: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Settle the schedule: which rank after which step."""
        if getattr(args, "world_size", 1) > 1:
            raise UnsupportedError("ranks cannot be annealed in several processes", got=f"{args.world_size} of them")
        layers = dict(lora_layers(model, self.adapter_name))
        start = max(layer.r[self.adapter_name] for layer in layers.values())
        self.plan = schedule(start, self.target, state.max_steps, self.ranks, self.steps)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Squeeze where a stage ends."""
        rank = self.plan.get(state.global_step)
        if rank is not None:
            row = {"step": state.global_step, **self.squeeze(model, rank, kwargs.get("optimizer"))}
            self.history.append(row)
            state.log_history.append({f"rank_annealer/{k}" if k != "step" else k: v for k, v in row.items()})

    def squeeze(self, model: Any, rank: int, optimizer: Any = None) -> dict[str, Any]:
        """Squeeze every layer of more channels to ``rank`` now; return the row of the history."""
        import torch

        name = self.adapter_name
        told: list[Cut] = []
        treated: set[str] = set()
        layers = dict(lora_layers(model, name))
        before = max(layer.r[name] for layer in layers.values())
        with torch.no_grad():
            for path, layer in layers.items():
                if layer.r[name] <= rank:
                    continue
                told.append(_squeeze_layer(path, layer, name, rank, self._moved(optimizer, treated)))
        say_ranks(model.peft_config[name], layers, name)
        whole = sum(one.norm**2 for one in told)
        error = sqrt(sum((one.error * one.norm) ** 2 for one in told) / whole) if whole else 0.0
        return {
            "rank_before": before,
            "rank_after": rank,
            "relative_error": error,
            "optimizer_state": "reset" if "reset" in treated else "projected" if treated else "none",
        }

    def _moved(self, optimizer: Any, treated: set[str]) -> Callable[[Any, Any, Callable[[Any, bool], Any]], None]:
        """Return what replaces one parameter in the optimizer, its state projected or reset."""
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it

        def replace(old: Any, new: Any, project: Callable[[Any, bool], Any]) -> None:
            if inner is None:
                return
            for group in inner.param_groups:
                group["params"] = [new if p is old else p for p in group["params"]]
            held = inner.state.pop(old, None)
            if not held:
                return
            moved = projected(held, old.shape, project) if self.optimizer_state == "project" else None
            treated.add("reset" if moved is None else "projected")
            if moved is not None:
                inner.state[new] = moved

        return replace


def schedule(
    start: int, target: int, max_steps: int, ranks: Sequence[int] | None, steps: Sequence[int] | None
) -> dict[int, int]:
    """Return step -> rank: what to squeeze to after which global step. Raises UsageError for what cannot be."""
    chosen = list(ranks) if ranks is not None else list(halves(start, target))
    if not chosen or any(high <= low for high, low in zip([start, *chosen], chosen, strict=False)):
        raise UsageError("ranks must fall from stage to stage", expected=f"below {start}", got=chosen or [target])
    count = len(chosen) + 1
    when = list(steps) if steps is not None else [max_steps * (i + 1) // count for i in range(len(chosen))]
    falls = any(late <= early for early, late in zip([0, *when], when, strict=False))
    if len(when) != len(chosen) or falls or when[-1] >= max_steps:
        raise UsageError(
            "the stages do not fit the training", expected=f"{len(chosen)} rising steps between 1 and {max_steps - 1}",
            got=when,
        )  # fmt: skip
    return dict(zip(when, chosen, strict=True))


def halves(start: int, target: int) -> Iterator[int]:
    """Yield start / 2, start / 4, ... and at last ``target``."""
    rank = start
    while rank > target:
        rank = max(rank // 2, target)
        yield rank


def lora_layers(model: Any, adapter_name: str) -> Iterator[tuple[str, Any]]:
    """Yield (module path, layer) of a PEFT model's LoRA layers. Raises UsageError and UnsupportedError."""
    from peft.tuners.lora.layer import LoraLayer
    from torch.nn import Linear

    if adapter_name not in getattr(model, "peft_config", {}):
        raise UsageError("the model has no such PEFT adapter", expected="a PeftModel with a LoRA", got=adapter_name)
    count = 0
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or adapter_name not in layer.r:
            continue
        variant = type(layer.lora_variant.get(adapter_name)).__name__ if hasattr(layer, "lora_variant") else "NoneType"
        linear = adapter_name in layer.lora_A and isinstance(layer.lora_A[adapter_name], Linear)
        if not linear or variant not in ("NoneType", *_VARIANTS):
            kind = type(layer).__name__ if variant == "NoneType" else variant
            raise UnsupportedError("only LoRA of linear layers is annealed", parameter=path, got=kind)
        count += 1
        yield path, layer
    if not count:
        raise UsageError("the adapter has no LoRA layers", got=adapter_name)


def _squeeze_layer(
    path: str, layer: Any, name: str, rank: int, moved: Callable[[Any, Any, Callable[[Any, bool], Any]], None]
) -> Cut:
    """Put the truncated factors into the layer as new parameters; the scale stays."""
    import torch

    a_layer, b_layer, s = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
    b, a = b_layer.weight.double(), a_layer.weight.double()
    found = weighted.cores(b, a, lambda _: rank, weights=Weights(), scale=1.0)
    into_b, into_a = found.left, found.right
    if not into_b.shape[1]:  # a zero update: its leading channels are as good as any, and can go on
        into_b, into_a = torch.eye(*into_b.shape[:1], rank).to(b), torch.eye(rank, a.shape[0]).to(a)
    kept = padded(LowRank(b @ into_b, into_a @ a), rank, name=path)
    into_b, into_a = _wide(into_b, 1, rank), _wide(into_a, 0, rank)
    for owner, value, project in (
        (b_layer, up(kept.b, "float64"), lambda x, square: x @ _powered(into_a, square).mT),
        (a_layer, up(kept.a, "float64"), lambda x, square: _powered(into_b, square).mT @ x),
    ):
        old = owner.weight
        new = torch.nn.Parameter(value.to(old.dtype).contiguous(), requires_grad=old.requires_grad)
        owner.weight = new
        moved(old, new, project)
    a_layer.out_features = b_layer.in_features = layer.r[name] = rank
    size = float(torch.linalg.vector_norm(found.s))
    return Cut(abs(s) * size, tail_error(found.s, min(rank, found.s.shape[0])) if size else 0.0)


def _wide(core: Any, axis: int, rank: int) -> Any:
    """Return a core with zeros for the channels that begin anew."""
    import torch

    missing = rank - core.shape[axis]
    if not missing:
        return core
    shape = [missing if i == axis else n for i, n in enumerate(core.shape)]
    return torch.cat([core, torch.zeros(shape, dtype=core.dtype, device=core.device)], dim=axis)


def _powered(core: Any, square: bool) -> Any:
    return core.square() if square else core


def projected(held: Mapping[str, Any], shape: Any, project: Callable[[Any, bool], Any]) -> dict[str, Any] | None:
    """Return an optimizer's state of one parameter in the new channels; None where its form is not known."""
    done = {}
    for key, value in held.items():
        if key in (*LINEAR, *SQUARED) and getattr(value, "shape", None) == shape:
            done[key] = project(value.double(), key in SQUARED).to(value.dtype).contiguous()
        elif getattr(value, "ndim", 0) == 0:
            done[key] = value  # a step count
        else:
            return None
    return done
