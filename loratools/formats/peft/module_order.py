"""In which order do a model's modules come? Some types number them, and their files do not tell.

The order is that of ``model.named_modules()``: a state dict and a pickle keep it, safetensors files sort their names.
For these it is known where the model's type is one whose layers are all alike and define their projections in a known
order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from loratools.errors import NeedsBaseError, UnsupportedError
from loratools.io.base import Base

_GATED = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj",
)  # fmt: skip
_DEFINED: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), _GATED),
    "gpt2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
}
_FIRST, _LAST = ("embed_tokens", "wte"), ("lm_head",)
_SORTED = ".safetensors"


def in_order(paths: Iterable[str], base: Base | None, names: Mapping[str, str], type: str) -> list[str]:
    """Return module paths in the order of the model; ``names`` are base names by the adapter's.

    Raises :class:`NeedsBaseError` without a base, :class:`UnsupportedError` where it does not tell the order.
    """
    if base is None:
        what = f"{type} files number the modules of the model, and do not tell their order"
        raise NeedsBaseError(what, expected="the base model, with its config.json", hint="pass --base")
    if not any(file.name.endswith(_SORTED) for file in base.files.values()):
        place = {name: i for i, name in enumerate(base)}
        return sorted(paths, key=lambda path: place[names.get(f"{path}.weight", f"{path}.weight")])
    defined = _DEFINED.get(str(base.config.get("model_type")), ())
    return sorted(paths, key=lambda path: _place(path, defined, type))


def _place(path: str, defined: tuple[str, ...], type: str) -> tuple[int, int, int]:
    last = path.rpartition(".")[2]
    if defined and last in _FIRST:
        return -1, 0, _FIRST.index(last)
    if defined and last in _LAST:
        return 1 << 30, 0, 0
    found = re.fullmatch(r"(?:.*\.)?(\d+)\.(.+)", path)
    if found is None or found.group(2) not in defined:
        raise UnsupportedError(
            f"{type} files number the modules of the model: their order cannot be told from a safetensors base",
            parameter=path,
            expected=f"a model_type among {', '.join(_DEFINED)}",
            hint="pass the base as a .bin file or a state dict, which keep it; or save the adapter with its indices",
        )
    return int(found.group(1)), defined.index(found.group(2)), 0
