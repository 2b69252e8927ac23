"""MatryoshkaLoRA's ``lora_adapters_step=N.pt``: ``<path>.lora_A`` (in, r) and ``<path>.lora_B`` (r, out), no prefix.

Both factors lie transposed: the forward is ``x A B``. Neither the scale s(r) (1, 1/r or 1/sqrt(r) of the training's
``lora_scaling``) nor the training ranks are in the file. docs/formats/matryoshka.md
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from loratools.core.adapter import Adapter
from loratools.core.update import Update
from loratools.errors import FormatError
from loratools.formats.base import FORMATS, Format
from loratools.formats.blocks import baked
from loratools.formats.kohya import said_before
from loratools.formats.metadata import carried, with_hashes
from loratools.formats.modules import Found, check_kinds, refuse_options
from loratools.formats.pairs import Parts, Tensor, grouped, low_rank_of, require
from loratools.formats.spaces import ready
from loratools.formats.stored import as_linear
from loratools.io.base import Base
from loratools.io.bundle import Bundle
from loratools.kinds.lowrank import LowRank

ROLES = {"lora_A": "a", "lora_B": "b"}


class Matryoshka(Format):
    """Nested factors of MatryoshkaLoRA, and of the LoRA and DyLoRA layers of its repository."""

    name = "matryoshka"
    accepts: ClassVar[tuple[type[Update], ...]] = (LowRank,)

    def declines(self, bundle: Bundle) -> str | None:
        """Claim bare ``lora_A`` and ``lora_B`` that multiply as they lie, A before B."""
        if bundle.config is not None and "peft_type" in bundle.config:
            return "a sidecar of PEFT"
        modules, _ = grouped(bundle.tensors, ROLES)
        if not modules:
            return "no bare lora_A and lora_B among the keys"
        return None if transposed(modules) else "lora_A (r, in), not (in, r)"

    def decode(self, bundle: Bundle, *, base: Base | None = None, allow_unknown: bool = False) -> Adapter:
        """Read the factors; the scale stays unknown."""
        modules, rest = grouped(bundle.tensors, ROLES)
        found = Found()
        for stem, parts in modules.items():
            a, b = require(parts, stem, "a", "b")
            if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[0]:
                expected, got = "lora_A (in, r), lora_B (r, out)", f"{a.shape}, {b.shape}"
                raise FormatError("the factors do not multiply", parameter=stem, expected=expected, got=got)
            found.add(f"{stem}.weight", LowRank(b.T, a.T), parts)
        found.rest(rest, allow_unknown=allow_unknown)
        found.remarks.append(
            "the file does not say its scale (1, 1/r or 1/sqrt(r) by lora_scaling of the training): 1 stands for it"
        )
        return found.adapter(bundle, self.name, base, scaled=False)

    def encode(self, adapter: Adapter, *, base: Base | None = None, **options: Any) -> Bundle:
        """Write the same keys as safetensors; scales are multiplied into ``lora_B`` (for ``lora_scaling`` none)."""
        refuse_options(self.name, options)
        check_kinds(adapter, self.accepts, self.name)
        spoken = ready(adapter, "hf", format=self.name)
        tensors: dict[str, Tensor] = {}
        for name in spoken:
            keys = said_before(spoken, name, self.name).get("keys", {})
            pair, stem = baked(low_rank_of(name, as_linear(spoken, name))[0]), name.removesuffix(".weight")
            tensors |= {keys.get("a", f"{stem}.lora_A"): pair.a.T, keys.get("b", f"{stem}.lora_B"): pair.b.T}
        if adapter.meta.source == self.name:
            tensors |= adapter.meta.leftover
        return Bundle(tensors, with_hashes(carried(adapter.meta, self.name), tensors), container="safetensors")


def transposed(modules: Mapping[str, Parts]) -> bool:
    """Tell (in, r), (r, out) from loralib's (r, in), (out, r), by shapes alone.

    Square layers multiply both ways; the rank is then the side that is not larger. Where nothing tells, loralib it is.
    """
    pairs = [(p["a"][1].shape, p["b"][1].shape) for p in modules.values() if {"a", "b"} <= p.keys()]
    if not pairs or any(len(a) != 2 or len(b) != 2 for a, b in pairs):
        return False
    return all(a[1] == b[0] and a[1] <= a[0] for a, b in pairs) and any(a[0] != b[1] or a[1] < a[0] for a, b in pairs)


FORMATS.add("matryoshka")(Matryoshka())
