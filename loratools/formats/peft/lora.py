"""``peft_type: LORA``: low-rank factors with their scale in the sidecar (arXiv:2106.09685, PEFT's ``LoraConfig``)."""

from __future__ import annotations

from typing import Any

from loratools.core.adapter import Adapter
from loratools.formats.peft import lora_read, lora_write
from loratools.formats.peft.types import peft_type
from loratools.io.base import Base
from loratools.io.bundle import Bundle


@peft_type("LORA")
class Lora:
    """Reader and writer of LoRA, rsLoRA and DoRA, with patterns, biases and whole saved modules."""

    def decode(self, bundle: Bundle, *, base: Base | None = None, allow_unknown: bool = False) -> Adapter:
        """See :func:`loratools.formats.peft.lora_read.read`."""
        return lora_read.read(bundle, base=base, allow_unknown=allow_unknown)

    def encode(self, adapter: Adapter, *, base: Base | None = None, **options: Any) -> Bundle:
        """See :func:`loratools.formats.peft.lora_write.write`."""
        return lora_write.write(adapter, **options)
