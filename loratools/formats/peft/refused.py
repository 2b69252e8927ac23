"""Types that are no update of weights, or whose update cannot be told from the file: each refused with its sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from loratools.core.adapter import Adapter
from loratools.errors import UnsupportedError
from loratools.formats.peft.types import PEFT_TYPES
from loratools.io.base import Base
from loratools.io.bundle import Bundle

_PROMPTS = "no weight changes, so there is nothing to merge, squeeze or convert"
REASONS: Mapping[str, tuple[str, str | None]] = {
    "PROMPT_TUNING": (f"prompt tuning learns embeddings of virtual tokens: {_PROMPTS}", None),
    "MULTITASK_PROMPT_TUNING": (f"multitask prompt tuning learns virtual tokens per task: {_PROMPTS}", None),
    "P_TUNING": (f"p-tuning learns an encoder of virtual tokens: {_PROMPTS}", None),
    "PREFIX_TUNING": (f"prefix tuning learns keys and values that attention sees before the text: {_PROMPTS}", None),
    "CPT": (f"context-aware prompt tuning learns virtual tokens: {_PROMPTS}", None),
    "CARTRIDGE": (f"a cartridge is a trained cache of keys and values: {_PROMPTS}", None),
    "ADAPTION_PROMPT": (
        "adaption prompts (LLaMA-Adapter) add gated attention to learned tokens, which no weight of the base holds",
        None,
    ),
    "XLORA": (
        "X-LoRA mixes other adapters by a router, token by token and layer by layer: it is no update of weights",
        "read the adapters that it mixes, each by its own path",
    ),
    "MIXLORA": (
        "MixLoRA routes every token to some of its experts: it is no update of weights",
        "loratools collapse makes a static adapter of some of its experts",
    ),
    "LILY": ("Lily's router chooses how its shared factors mix from every input: it is no update of weights", None),
    "SHADOW": ("a shadow model is a second network beside the base: it is no update of the base's weights", None),
    "POLY": (
        "Poly mixes its skills by task id, which the file does not fix: without a task there is no one update",
        "merge it with PEFT for the task you want, and extract the difference",
    ),
    "ADAMSS": (
        "AdaMSS assigns rows to subspaces by k-means on the base's weights, and does not save who belongs where: "
        "clusters found again may differ, silently",
        "merge it with PEFT on the machine that trained it, and extract the difference",
    ),
}  # fmt: skip
"""``peft_type`` -> (why it is refused, what to do instead)."""


class Refused:
    """Stands for a type that is not read."""

    def __init__(self, name: str) -> None:
        self.name = name

    def decode(self, bundle: Bundle, *, base: Base | None = None, allow_unknown: bool = False) -> Adapter:
        """Raise :class:`UnsupportedError` with the reason."""
        self._refuse()

    def encode(self, adapter: Adapter, *, base: Base | None = None, **options: Any) -> Bundle:
        """Raise likewise."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        why, hint = REASONS[self.name]
        raise UnsupportedError(why, got=f"peft_type {self.name}", hint=hint)


for _name in REASONS:
    PEFT_TYPES.add(_name)(Refused(_name))
