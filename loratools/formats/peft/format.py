"""The PEFT format: adapter_model.safetensors (or .bin) beside adapter_config.json."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from loratools.core.adapter import Adapter
from loratools.errors import ConversionError, FormatError, UnsupportedError
from loratools.formats.base import FORMATS, Format
from loratools.formats.peft.keys import PREFIX, parse
from loratools.formats.peft.types import PEFT_TYPES
from loratools.formats.peft.verbatim import is_typed, is_verbatim, stays, write
from loratools.formats.stored import on_output_axis
from loratools.io.base import Base
from loratools.io.bundle import Bundle
from loratools.kinds.dense import Dense
from loratools.kinds.dora import Dora
from loratools.kinds.lowrank import LowRank
from loratools.kinds.rebased import Rebased
from loratools.kinds.replace import Replace
from loratools.kinds.replace_rows import ReplaceRows
from loratools.kinds.sparse import Sparse
from loratools.kinds.stack import Stack

_FACTORS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


class Peft(Format):
    """Adapters of Hugging Face PEFT; one file per ``peft_type`` in this package."""

    name = "peft"
    accepts = (LowRank, Stack, Dora, Dense, Replace, ReplaceRows, Rebased, Sparse)

    def holds(self, adapter: Adapter, name: str) -> bool:
        """Magnitudes over the output axis; differences of biases that PEFT wrote; as many entries as SHiRA has."""
        if is_typed(adapter):
            return stays(adapter, name) or isinstance(adapter[name], Replace)
        if isinstance(adapter[name], Sparse) and not _is_shira(adapter, name):
            return False
        whole = isinstance(adapter[name], Dense) and adapter.meta.layout.get(name, {}).get("stored") != "lora_bias"
        return super().holds(adapter, name) and on_output_axis(adapter, name) and not whole

    def declines(self, bundle: Bundle) -> str | None:
        """Claim a bundle whose sidecar says ``peft_type``, or whose keys carry PEFT's prefix or factor names."""
        if any(key.endswith(".lora_a.weight") for key in bundle.tensors):
            return "torchtune's keys beside PEFT's sidecar"
        if bundle.config is not None and "peft_type" in bundle.config:
            return None
        if any(".hypernet." in key for key in bundle.tensors):
            return "a network that generates factors (HypeLoRA)"
        if any(key.startswith(PREFIX) or parse(key).leaf in _FACTORS for key in bundle.tensors):
            return None if not _looks_foreign(bundle) else "keys of another program"
        return "no peft_type in a sidecar and no lora_A.weight or base_model.model. among the keys"

    def decode(self, bundle: Bundle, *, base: Base | None = None, allow_unknown: bool = False) -> Adapter:
        """Hand over to the reader of the bundle's ``peft_type``."""
        if bundle.config is None:
            raise _without_config(bundle)
        return PEFT_TYPES[self._type(bundle)].decode(bundle, base=base or None, allow_unknown=allow_unknown)

    def encode(self, adapter: Adapter, *, base: Base | None = None, component: str = "", **options: Any) -> Bundle:
        """Write as LORA, the one type that every reader of PEFT files knows; sparse updates as SHIRA.

        Other types are written where their tensors are at hand: read so and unchanged, or projected onto
        (``convert --type``).

        ``component`` picks one model of an adapter that acts on several (``unet``, ``text_encoder``).
        """
        if component or adapter.meta.source != self.name:  # names of another program
            from loratools.formats.spaces import ready

            adapter = ready(adapter, "hf", format=self.name, component=component)
        if is_verbatim(adapter):
            return write(adapter, **options)
        said = "SHIRA" if any(isinstance(u, Sparse) for u in adapter.values()) else "LORA"
        return PEFT_TYPES[said].encode(adapter, base=base, **options)

    def _type(self, bundle: Bundle) -> str:
        config = bundle.config or {}
        if config.get("peft_type") is None:
            raise FormatError("adapter_config.json does not say peft_type", expected='"peft_type": "LORA"')
        said = str(config["peft_type"]).upper()
        if said not in PEFT_TYPES:
            raise UnsupportedError(
                f"adapters of peft_type {said} are not read by this version",
                expected=", ".join(PEFT_TYPES),
                hint="convert it to LORA with PEFT's own save_as_lora",
            )
        return said


def _is_shira(adapter: Adapter, name: str) -> bool:
    """Return whether PEFT would load a sparse update as SHiRA."""
    from loratools.formats.peft.shira import legal_rank

    try:
        legal_rank(replace(adapter, updates={name: adapter[name]}))
    except ConversionError:
        return False
    return True


def _without_config(bundle: Bundle) -> FormatError:
    if bundle.container == "memory":
        return FormatError(
            "no config with the tensors: their scale is unknown",
            expected="the object of adapter_config.json, which holds r and lora_alpha",
            hint="pass config=...",
        )
    return FormatError(
        "no adapter_config.json beside the weights: their scale is unknown",
        expected="adapter_config.json in the same directory",
        hint="copy it there; it holds r and lora_alpha",
    )


def _looks_foreign(bundle: Bundle) -> bool:
    """True for files of diffusion programs that share the spelling ``lora_A.weight``."""
    from loratools.formats.spaces import component_of, world

    return any(world(key) in ("diffusers", "authors") or component_of(key) for key in bundle.tensors)


FORMATS.add("peft")(Peft())
