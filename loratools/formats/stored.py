"""How a base stores the parameter that an update is for: by its name, or as the reader of the file noted it."""

from __future__ import annotations

from loratools.core.adapter import Adapter
from loratools.core.update import Update
from loratools.errors import ConversionError
from loratools.kinds.dora import Dora
from loratools.kinds.lowrank import LowRank

EMBEDDINGS = (
    "embed_tokens",
    "wte",
    "wpe",
    "word_embeddings",
    "embed_in",
    "shared",
    "tok_embeddings",
    "token_embedding",
)
CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # model types whose layers are stored (in, out)


def is_turned(adapter: Adapter, name: str) -> bool:
    """True if the parameter is stored (in, out), as GPT-2's Conv1D does."""
    return adapter.meta.layout.get(name, {}).get("stored") == "in_out"


def on_output_axis(adapter: Adapter, name: str) -> bool:
    """True unless the update is a magnitude over the input axis, which only kohya's family knows."""
    u = adapter[name]
    return not isinstance(u, Dora) or u.axis == int(is_turned(adapter, name))


def is_bias_of_factors(adapter: Adapter, name: str) -> bool:
    """True for a bias difference beside the factors of its module, as ``lora_B.bias`` is."""
    module, _, leaf = name.rpartition(".")
    return leaf == "bias" and isinstance(adapter.get(f"{module}.weight"), LowRank | Dora)


def is_embedding(name: str) -> bool:
    """True for the weight of an input embedding, by its usual names."""
    return name.removesuffix(".weight").rpartition(".")[2] in EMBEDDINGS


def as_linear(adapter: Adapter, name: str) -> Update:
    """Return an update as a linear layer (out, in) has it: what is stored (in, out) is turned.

    Raises :class:`ConversionError` for a magnitude over another axis than PEFT's where the layer must be turned.
    """
    u = adapter[name]
    if not is_turned(adapter, name):
        return u
    if isinstance(u, LowRank):
        return LowRank(u.a.T, u.b.T, u.scale)
    if isinstance(u, Dora) and isinstance(u.direction, LowRank):
        d = u.direction
        return Dora(LowRank(d.a.T, d.b.T, d.scale), u.magnitude, axis=1 - u.axis, eps=u.eps)
    raise ConversionError(f"a {u.kind} update of a parameter that is stored (in, out)", parameter=name)
