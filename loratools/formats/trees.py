"""Other programs' names for the modules of language models, and the row order of rotary projections.

Only model types whose conversion is known row by row are listed: a wrong guess would be silent garbage. The tables of
GGUF agree with ``gguf.TensorNameMap`` (tested).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratools.errors import NeedsBaseError, UnsupportedError

_LLAMA = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
_PHI3 = {
    "self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output", "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
_STARCODER = {
    **{k: v for k, v in _LLAMA.items() if k.startswith("self_attn")},
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_GPT2 = {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
_OUTER = {"model.embed_tokens": "token_embd", "lm_head": "output"}
_TORCHTUNE = {
    "self_attn.q_proj": "attn.q_proj", "self_attn.k_proj": "attn.k_proj", "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj", "mlp.gate_proj": "mlp.w1", "mlp.up_proj": "mlp.w3",
    "mlp.down_proj": "mlp.w2",
}  # fmt: skip


@dataclass(frozen=True)
class Tree:
    """How a program names one model type; ``rotary`` lists the modules whose rows it stores in another order."""

    arch: str
    theirs: str
    block: str
    modules: Mapping[str, str]
    outer: Mapping[str, str]
    rotary: tuple[str, ...] = ()


GGUF: Mapping[str, Tree] = {
    "llama": Tree("llama", "blk", "model.layers", _LLAMA, _OUTER, ("attn_q", "attn_k")),
    "mistral": Tree("llama", "blk", "model.layers", _LLAMA, _OUTER, ("attn_q", "attn_k")),
    **{name: Tree(name, "blk", "model.layers", _LLAMA, _OUTER) for name in ("qwen2", "qwen3", "gemma", "gemma2")},
    "gemma3_text": Tree("gemma3", "blk", "model.layers", _LLAMA, _OUTER),
    "phi3": Tree("phi3", "blk", "model.layers", _PHI3, _OUTER),
    "starcoder2": Tree("starcoder2", "blk", "model.layers", _STARCODER, _OUTER),
    "gpt2": Tree(
        "gpt2", "blk", "transformer.h", _GPT2, {"transformer.wte": "token_embd", "transformer.wpe": "position_embd"}
    ),
}
TORCHTUNE: Mapping[str, Tree] = {
    **{
        name: Tree(name, "layers", "model.layers", _TORCHTUNE, {"lm_head": "output"}, ("attn.q_proj", "attn.k_proj"))
        for name in ("llama", "mistral")
    },
    "qwen2": Tree("qwen2", "layers", "model.layers", _TORCHTUNE, {"lm_head": "output"}),
}


@dataclass(frozen=True)
class Heads:
    """Numbers of attention heads, of queries and of keys."""

    query: int
    key: int


def tree_of(trees: Mapping[str, Tree], model_type: str, program: str) -> Tree:
    """Return the tree of a model type; :class:`UnsupportedError` names those that are known."""
    if model_type not in trees:
        raise UnsupportedError(
            f"{program}'s names and row orders for model type {model_type!r} are not known here",
            expected=", ".join(trees),
            hint=f"convert to PEFT, and let {program}'s own converter do the rest",
        )
    return trees[model_type]


def tree_of_arch(arch: str) -> Tree | None:
    """Return the tree of a GGUF architecture, or None. Types of one architecture share theirs."""
    return next((tree for tree in GGUF.values() if tree.arch == arch), None)


def to_theirs(tree: Tree, module: str) -> str | None:
    """Return the program's name of a module path, or None."""
    if module in tree.outer:
        return tree.outer[module]
    found = re.fullmatch(rf"{re.escape(tree.block)}\.(\d+)\.(.+)", module)
    stem = tree.modules.get(found[2]) if found else None
    return None if stem is None or found is None else f"{tree.theirs}.{found[1]}.{stem}"


def from_theirs(tree: Tree, stem: str) -> str | None:
    """Return the module path of a program's name, or None."""
    outer = {new: old for old, new in tree.outer.items()}
    if stem in outer:
        return outer[stem]
    found = re.fullmatch(rf"{tree.theirs}\.(\d+)\.(.+)", stem)
    back = {new: old for old, new in tree.modules.items()}
    return f"{tree.block}.{found[1]}.{back[found[2]]}" if found and found[2] in back else None


def is_rotary(tree: Tree, stem: str) -> bool:
    """True for a module whose rows the program stores in another order."""
    return stem.endswith(tuple(f".{name}" for name in tree.rotary))


def interleaving(tree: Tree, stem: str, rows: int, heads: Heads | None) -> list[int] | None:
    """Return, for each row of theirs, the row of the Hugging Face weight; None where the order is the same.

    Inside a head of d rows, half h and pair j lie at h d/2 + j there and at 2 j + h here.
    """
    if not is_rotary(tree, stem):
        return None
    if heads is None:
        raise NeedsBaseError(
            "the row order of q and k needs the numbers of heads",
            parameter=stem,
            hint="--base MODEL (its config.json is enough), or --set heads=N --set kv_heads=N",
        )
    count = heads.query if stem.endswith(f".{tree.rotary[0]}") else heads.key
    d = rows // count
    if rows != d * count or d % 2:
        raise UnsupportedError(
            "rows are not whole heads", parameter=stem, expected=f"{count} heads", got=f"{rows} rows"
        )
    return [head * d + h * (d // 2) + j for head in range(count) for j in range(d // 2) for h in range(2)]


def inverse(order: Sequence[int]) -> list[int]:
    """Return the inverse permutation."""
    back = [0] * len(order)
    for here, there in enumerate(order):
        back[there] = here
    return back


def heads_of(config: Mapping[str, Any]) -> Heads | None:
    """Return the head counts that a model's config.json says, or None."""
    text = config.get("text_config", config)
    query = text.get("num_attention_heads")
    return None if query is None else Heads(int(query), int(text.get("num_key_value_heads") or query))
