"""PEFT adapters: one file per ``peft_type``, and the grammar they share."""

from loratools.formats.peft.format import Peft

__all__ = ["Peft"]
