"""Sam_LoRA's files for SAM image encoders: ``w_a_000`` (r, d), ``w_b_000`` (d, r); scale 1. docs/formats/samlora.md

Pair 2n acts on q and pair 2n + 1 on v of ``image_encoder.blocks.n.attn.qkv``: one update of the fused projection.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from loratools.core.adapter import Adapter
from loratools.core.update import Leaf, Update, shape_of
from loratools.errors import ConversionError, FormatError
from loratools.formats.base import FORMATS, Format
from loratools.formats.blocks import baked, is_zero, rows_of, split, taken
from loratools.formats.metadata import carried, with_hashes
from loratools.formats.modules import Found, check_kinds, refuse_options
from loratools.formats.pairs import Tensor, low_rank_of
from loratools.formats.spaces import ready
from loratools.formats.stored import as_linear
from loratools.io.base import Base
from loratools.io.bundle import Bundle
from loratools.kinds.lowrank import LowRank
from loratools.linalg.namespace import to_numpy

_KEY = re.compile(r"w_([ab])_(\d{3,})")
_NAME = re.compile(r"(?:.*\.)?blocks\.(\d+)\.attn\.qkv\.weight")


class SamLora(Format):
    """LoRA on q and v of SAM's image encoder."""

    name = "samlora"
    accepts: ClassVar[tuple[type[Update], ...]] = (LowRank,)

    def declines(self, bundle: Bundle) -> str | None:
        """Claim numbered w_a and w_b."""
        return None if any(map(_KEY.fullmatch, bundle.tensors)) else "no w_a_000 among the keys"

    def decode(self, bundle: Bundle, *, base: Base | None = None, allow_unknown: bool = False) -> Adapter:
        """Join q and v of every block into one update of the fused projection (k stays as it is)."""
        found = Found()
        pairs = _pairs(bundle.tensors)
        for block in range(len(pairs) // 2):
            q, v = pairs[2 * block], pairs[2 * block + 1]
            keys = {
                f"{role}{i}": (f"w_{role}_{2 * block + i:03d}", leaf)
                for i, p in enumerate((q, v))
                for role, leaf in p.items()
            }
            name = f"image_encoder.blocks.{block}.attn.qkv.weight"
            found.add(name, _joined(block, q, v), keys, ranks=[q["a"].shape[0], v["a"].shape[0]])
        found.rest({k: t for k, t in bundle.tensors.items() if not _KEY.fullmatch(k)}, allow_unknown=allow_unknown)
        return found.adapter(bundle, self.name, base, namespace="hf")

    def encode(self, adapter: Adapter, *, base: Base | None = None, **options: Any) -> Bundle:
        """Write q and v of every block from 0 on; scales are multiplied into w_b. An update of k is refused."""
        refuse_options(self.name, options)
        check_kinds(adapter, self.accepts, self.name)
        spoken = ready(adapter, "hf", format=self.name)
        tensors: dict[str, Tensor] = {}
        blocks = {int(m[1]): n for n in spoken if (m := _NAME.fullmatch(n))}
        if len(blocks) < len(spoken) or sorted(blocks) != list(range(len(blocks))):
            raise ConversionError(
                "Sam_LoRA's files hold qkv of all blocks and nothing else", got=f"{len(spoken)} updates"
            )
        for block, name in sorted(blocks.items()):
            u, _ = low_rank_of(name, as_linear(spoken, name))
            ranks = adapter.meta.layout.get(name, {}).get("ranks", ())
            for i, part in enumerate(_halves(name, baked(u), ranks)):
                tensors |= {f"w_a_{2 * block + i:03d}": part.a, f"w_b_{2 * block + i:03d}": part.b}
        if adapter.meta.source == self.name:
            tensors |= adapter.meta.leftover
        return Bundle(tensors, with_hashes(carried(adapter.meta, self.name), tensors), container="safetensors")


def _pairs(tensors: Mapping[str, Leaf]) -> list[dict[str, Leaf]]:
    found: dict[int, dict[str, Leaf]] = {}
    for key, leaf in tensors.items():
        if m := _KEY.fullmatch(key):
            found.setdefault(int(m[2]), {})[m[1]] = leaf
    whole = sorted(found) == list(range(len(found))) and len(found) % 2 == 0
    if not whole or any(p.keys() != {"a", "b"} for p in found.values()):
        raise FormatError(
            "numbered pairs are missing", expected="w_a and w_b of q and v for every block", got=len(found)
        )
    return [found[i] for i in sorted(found)]


def _joined(block: int, q: Mapping[str, Leaf], v: Mapping[str, Leaf]) -> LowRank:
    """Return the update of the fused projection; its factors are put together when they are read."""
    d, r1, r2 = q["b"].shape[0], q["a"].shape[0], v["a"].shape[0]
    if q["b"].shape != (d, r1) or v["b"].shape != (d, r2) or {q["a"].shape[1], v["a"].shape[1]} != {d}:
        raise FormatError("the factors do not fit one projection", parameter=f"block {block}", got=q["b"].shape)

    def b(out: object) -> Any:
        x = np.zeros((3 * d, r1 + r2), to_numpy(q["b"]).dtype)
        x[:d, :r1], x[2 * d :, r1:] = to_numpy(q["b"]), to_numpy(v["b"])
        return x

    def a(out: object) -> Any:
        return np.concatenate([to_numpy(q["a"]), to_numpy(v["a"])])

    return LowRank(Leaf((3 * d, r1 + r2), q["b"].dtype, b), Leaf((r1 + r2, d), q["a"].dtype, a))


def _halves(name: str, u: LowRank, ranks: Sequence[int]) -> list[LowRank]:
    d = u.shape[1]
    if u.shape[0] != 3 * d or not is_zero(taken(u, slice(d, 2 * d))):
        raise ConversionError(
            "Sam_LoRA's files hold no update of k",
            parameter=name,
            got=u.shape,
            hint="--to peft or --to native holds it",
        )
    if sum(ranks) == u.rank and len(ranks) == 2:
        b = to_numpy(u.b)
        if not (b[:d, ranks[0] :].any() or b[2 * d :, : ranks[0]].any()):
            return [_cut(u, slice(0, d), slice(0, ranks[0])), _cut(u, slice(2 * d, 3 * d), slice(ranks[0], u.rank))]
    q, _, v = split(u, [d, d, d])
    assert isinstance(q, LowRank) and isinstance(v, LowRank)
    return [q, v]


def _cut(u: LowRank, rows: slice, columns: slice) -> LowRank:
    b = rows_of(rows_of(u.b, rows).T, columns).T
    return LowRank(b, rows_of(u.a, columns), 1.0, (shape_of(b)[0], u.shape[1]))


FORMATS.add("samlora")(SamLora())
