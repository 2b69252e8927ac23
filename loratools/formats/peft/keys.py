"""The grammar of PEFT's tensor keys, ``base_model.model.<module path>.<leaf>``, and the spellings of real files."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

PREFIX = "base_model.model."
SAVED, ORIGINAL = ".modules_to_save.", ".original_module."
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_LEAVES = (
    "lora_", "vera_", "ia3_", "hada_", "lokr_", "oft_", "boft_", "shira_", "fourierft_", "randlora_", "vblora_",
    "miss_", "bone_", "hra_u", "road_", "c3a_", "waveft_", "delora_", "gralora_", "hira_", "tinylora_", "loftq_",
    "token_adapter",
)  # fmt: skip
_NAMED = ("lora_A", "lora_B", "lora_E", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "lora_diag")


class Key(NamedTuple):
    """A parsed key. ``leaf`` is ``lora_A.weight`` and the like, or "" for a plain parameter, whose name is ``path``."""

    path: str
    leaf: str
    adapter: str | None = None


def unwrapped(key: str) -> str:
    """Return a key without the segments that compiling, sharding and checkpointing put into it."""
    for wrapper in _WRAPPERS:
        key = key.replace(wrapper, "")
    return key


def parse(key: str) -> Key:
    """Split a key into module path and leaf; prefix, compile wrappers and a left-in adapter name are taken off."""
    bare = unwrapped(key).removeprefix(PREFIX)
    segments = bare.split(".")
    at = next((i for i, segment in enumerate(segments) if i and segment.startswith(_LEAVES)), None)
    if at is None:
        return Key(bare, "")
    return _leaf(".".join(segments[:at]), segments[at:])


def _leaf(path: str, rest: list[str]) -> Key:
    """Return the key of a leaf: ``[lora_A, default, weight]`` is ``lora_A.weight`` of the adapter ``default``."""
    if rest[0] not in _NAMED:
        return Key(path, ".".join(rest))
    tail = rest[-1] if len(rest) > 1 and rest[-1] in ("weight", "bias") else ""
    adapter = ".".join(rest[1 : len(rest) - bool(tail)]) or None
    named = rest[0] == "lora_magnitude_vector" or not tail
    return Key(path, rest[0] if named else f"{rest[0]}.{tail}", adapter)


def parameter(path: str, adapters: Iterable[str] = ()) -> tuple[str, bool]:
    """Return the base name of a plain key, and whether the key spells it in PEFT's plain way.

    ``x.modules_to_save.dense.weight`` and ``x.base_layer.weight`` are ``x.dense.weight`` and ``x.weight``; after
    ``modules_to_save`` a name among ``adapters`` is left out, too.
    """
    saved = path
    for name in adapters:
        saved = saved.replace(f"{SAVED}{name}.", ".")
    saved = saved.replace(SAVED, ".")
    return saved.replace(".base_layer.", "."), saved == path


def saved_segment(path: str) -> tuple[str, str]:
    """Return the saved module and the segment after ``modules_to_save``: an adapter's name or a submodule's.

    Both are empty where there is none: ``x.modules_to_save.weight``.
    """
    module, _, rest = path.partition(SAVED)
    segment, dot, _ = rest.partition(".")
    return (module, segment) if dot else ("", "")


def is_original(path: str) -> bool:
    """True for the base's own copy of a saved module, which says nothing about the adapter."""
    return ORIGINAL in path
