"""Second moments of inputs that need no data: a layer norm hands on gain * x + bias with the x_j of mean square 1.

So a linear layer that reads a norm's output sees channel j with mean square gain_j^2 + bias_j^2. That is what the base
alone tells of the inputs; correlations and outliers that training put into x it does not tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from loratools.core.update import Array, namespace
from loratools.errors import MismatchError
from loratools.io.base import Base
from loratools.io.bundle import memory_leaf
from loratools.io.stats import Stats
from loratools.linalg.namespace import up

_QKV = ("q_proj", "k_proj", "v_proj", "qkv_proj")
_READERS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (  # norms of a layer, in order of trust; who reads them
    (("input_layernorm",), (*(f"self_attn.{x}" for x in _QKV), "self_attention.query_key_value",
                            "attention.query_key_value")),
    (("pre_feedforward_layernorm", "post_attention_layernorm"),
     ("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj", "mlp.dense_h_to_4h")),
    (("layer_norm1",), tuple(f"self_attn.{x}" for x in _QKV)),
    (("layer_norm2",), ("mlp.fc1",)),
    (("ln_1",), ("attn.c_attn",)),
    (("ln_2",), ("mlp.c_fc",)),
    (("layernorm_before",), tuple(f"attention.attention.{x}" for x in ("query", "key", "value"))),
    (("layernorm_after",), ("intermediate.dense",)),
    (("norm", "ln_f", "final_layernorm"), ("lm_head",)),
)  # fmt: skip
_POST_NORM = "post_feedforward_layernorm"  # without a norm before the MLP: the layer norms outputs, not inputs
_TEXT_MODELS = ("model.", "model.language_model.", "language_model.model.", "transformer.")  # beside their heads
_FROM_ONE = ("gemma", "gemma2", "gemma3", "gemma3_text", "paligemma", "qwen3_next")  # these store the gain minus 1


def norm_gains(names: Iterable[str], base: Base) -> dict[str, Stats]:
    """Return ``in_diag`` of mean 1 for the parameters whose modules read a norm's output.

    Names are matched as everywhere (:meth:`Base.resolve`). The mean of 1 leaves out what the norms say between
    modules: others have no such number to compare with. Raises MismatchError where the base has none of the names.
    """
    wanted = list(names)
    found = base.resolve(wanted, wanted)
    if wanted and not found:
        raise MismatchError(
            "the base has none of the adapter's parameters", file=base.path, got=", ".join(wanted[:3]),
            hint="check that this is the base the adapter was trained on",
        )  # fmt: skip
    return {name: stats for name, target in found.items() if (stats := _stats(target, base)) is not None}


def _stats(parameter: str, base: Base) -> Stats | None:
    norm = _norm_before(parameter.removesuffix(".weight"), base)
    if norm is None:
        return None
    gain = up(base[f"{norm}.weight"])
    if base.config.get("model_type") in _FROM_ONE:
        gain = 1.0 + gain
    shift = f"{norm}.bias"
    square = gain**2 + (up(base[shift]) ** 2 if shift in base else 0.0)
    return Stats(in_diag=memory_leaf(parameter, _mean_one(square)))


def _mean_one(x: Array) -> Array:
    return x / namespace(x).mean(x)


def _norm_before(module: str, base: Mapping[str, Array]) -> str | None:
    """Return the path of the norm whose output the module reads, where a table knows."""
    for norms, readers in _READERS:
        reader = next((r for r in readers if module == r or module.endswith(f".{r}")), None)
        if reader is None:
            continue
        layer = module.removesuffix(reader)
        trusted = norms[:1] if f"{layer}{_POST_NORM}.weight" in base else norms
        homes = (layer, *_TEXT_MODELS) if reader == "lm_head" else (layer,)
        found = next((f"{h}{n}" for h in homes for n in trusted if f"{h}{n}.weight" in base), None)
        if found is not None:
            return found
    return None
