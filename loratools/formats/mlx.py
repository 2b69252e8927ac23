"""MLX adapters (mlx-lm): ``adapters.safetensors`` (or old ``adapters.npz``) beside ``adapter_config.json``.

``<path>.lora_a`` (in, r), ``<path>.lora_b`` (r, out), ``<path>.m`` (out,): factors transposed against everyone else.
The scale is ``lora_parameters.scale``, the final multiplier, one for all modules, as is the rank. docs/formats/mlx.md
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from loratools.core.adapter import Adapter
from loratools.core.update import Leaf, Update
from loratools.errors import ConversionError, FormatError, MissingScaleError, UnsupportedError
from loratools.formats.base import FORMATS, Format
from loratools.formats.metadata import carried, with_hashes
from loratools.formats.modules import Found, check_kinds, refuse_options
from loratools.formats.pairs import Parts, Tensor, grouped, low_rank_of, require, scale_and_rank
from loratools.formats.spaces import ready
from loratools.formats.stored import as_linear, is_embedding, on_output_axis
from loratools.io.base import Base
from loratools.io.bundle import Bundle
from loratools.kinds.dora import Dora
from loratools.kinds.lowrank import LowRank
from loratools.linalg.namespace import down, dtype_name, namespace, to_numpy, up

_ROLES = {"lora_a": "a", "lora_b": "b", "m": "magnitude"}
_BLOCKS = ("layers", "blocks", "h")


class Mlx(Format):
    """Adapters that mlx-lm trains and loads."""

    name = "mlx"
    accepts: ClassVar[tuple[type[Update], ...]] = (LowRank, Dora)
    one_rank = True

    def holds(self, adapter: Adapter, name: str) -> bool:
        """Magnitudes over the output axis only."""
        return super().holds(adapter, name) and on_output_axis(adapter, name)

    def declines(self, bundle: Bundle) -> str | None:
        """Claim bare ``lora_a`` and ``lora_b``; a PEFT sidecar declines."""
        if bundle.config is not None and "peft_type" in bundle.config:
            return "a sidecar of PEFT"
        modules, _ = grouped(bundle.tensors, _ROLES)
        bare = [stem for stem, parts in modules.items() if {"a", "b"} <= parts.keys()]
        if not bare or any(stem.endswith(".weight") for stem in bare):
            return "no lora_a and lora_b among the keys"
        if any(key.endswith((".multi_lora_a", ".multi_lora_b")) for key in bundle.tensors):
            return "t-few's scaling vectors beside lora_a and lora_b"
        return None

    def decode(self, bundle: Bundle, *, base: Base | None = None, allow_unknown: bool = False) -> Adapter:
        """Read every module; without a sidecar the scale is unknown, and said to be."""
        config = bundle.config or {}
        scale = _scale(config)
        modules, rest = grouped(bundle.tensors, _ROLES)
        found = Found()
        for stem, parts in modules.items():
            found.add(f"{stem}.weight", _update(stem, parts, 1.0 if scale is None else scale), parts)
        found.rest(rest, allow_unknown=allow_unknown)
        if scale is None:
            found.remarks.append(
                "no adapter_config.json: the scale is unknown (mlx-lm's default is 20.0), 1 stands for it"
            )
        rank = config.get("lora_parameters", {}).get("rank")
        ranks = {scale_and_rank(u)[1] or 0 for u in found.updates.values()}
        if rank is not None and ranks != {rank}:
            found.remarks.append(f"the config says rank {rank}, the tensors have {sorted(ranks)}")
        return found.adapter(
            bundle, self.name, base, scaled=scale is not None, base_id=config.get("model"), namespace="hf"
        )

    def encode(self, adapter: Adapter, *, base: Base | None = None, **options: Any) -> Bundle:
        """Write one rank and one scale: unequal ranks are padded with zeros, unequal scales are in ``lora_b``."""
        refuse_options(self.name, options)
        check_kinds(adapter, self.accepts, self.name)
        spoken = ready(adapter, "hf", format=self.name)
        forms = {name: low_rank_of(name, as_linear(spoken, name)) for name in spoken}
        if len({magnitude is None for _, magnitude in forms.values()}) > 1:
            raise ConversionError("MLX has no file with magnitudes on some modules only", hint="--base BASE --lossy")
        pairs = {name: u for name, (u, _) in forms.items()}
        rank = max(u.rank for u in pairs.values())
        scales = {u.scale for u in pairs.values()}
        scale = scales.pop() if len(scales) == 1 else 1.0
        tensors: dict[str, Tensor] = {}
        for name, (u, magnitude) in forms.items():
            stem = _stem(name, u)
            b, a = _fitted(u, rank, scale)
            a, b = (b, a) if is_embedding(name) else (a.T, b.T)
            tensors |= {f"{stem}.lora_a": a, f"{stem}.lora_b": b}
            tensors |= {} if magnitude is None else {f"{stem}.m": magnitude}
        own = adapter.meta.source == self.name
        config = _config(spoken, rank, scale, forms) if adapter.meta.scaled or not own else None
        all_tensors = tensors | (dict(adapter.meta.leftover) if own else {})
        metadata = with_hashes(carried(adapter.meta, self.name), all_tensors)
        return Bundle(
            all_tensors, metadata, config=config, container="safetensors", siblings=adapter.meta.siblings,
            readme=adapter.meta.readme, weights="adapters.safetensors",
        )  # fmt: skip


def _scale(config: Mapping[str, Any]) -> float | None:
    """Return the multiplier, or None where no config says one."""
    if not config:
        return None
    if config.get("fine_tune_type") == "full":
        raise UnsupportedError("a full fine-tune of MLX is no adapter", hint="extract one from it and its base")
    said = config.get("lora_parameters", config)
    if not isinstance(said, Mapping) or "scale" not in said:
        raise MissingScaleError("adapter_config.json does not say lora_parameters.scale", expected="a number")
    value = said["scale"]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise FormatError("adapter_config.json: lora_parameters.scale is no number", got=repr(value)[:80])
    return float(value)


def _update(stem: str, parts: Parts, scale: float) -> Update:
    a, b = require(parts, stem, "a", "b")
    if len(a.shape) == 3 or len(b.shape) == 3:
        raise UnsupportedError("stacked experts (SwitchLinear): not read by this version", parameter=stem, got=a.shape)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[0]:
        raise FormatError("the factors do not multiply", parameter=stem, expected="lora_a (in, r), lora_b (r, out)",
                          got=f"{a.shape}, {b.shape}")  # fmt: skip
    if is_embedding(f"{stem}.weight"):
        if "magnitude" in parts:
            raise UnsupportedError("a magnitude on an embedding", parameter=stem)
        return LowRank(a, b, scale)
    direction = LowRank(b.T, a.T, scale)
    return Dora(direction, parts["magnitude"][1]) if "magnitude" in parts else direction


def _fitted(u: LowRank, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return (b, a) at the file's rank and scale."""
    if len(u.shape) != 2:
        raise ConversionError("MLX adapts linear layers and embeddings only", got=u.shape)
    b: Tensor = u.b if u.scale == scale else down(up(u.b) * (u.scale / scale), dtype_name(u.b))
    if u.rank == rank:
        return b, u.a
    return _padded(b, 1, rank), _padded(u.a, 0, rank)


def _padded(t: Leaf | Any, axis: int, rank: int) -> Any:
    x = to_numpy(t)
    xp = namespace(x)
    missing = rank - x.shape[axis]
    zeros = xp.zeros((x.shape[0], missing) if axis else (missing, x.shape[1]), dtype=x.dtype)
    return xp.concat([x, zeros], axis=axis)


def _stem(name: str, u: LowRank) -> str:
    if not name.endswith(".weight"):
        raise ConversionError("MLX adapts weights of modules only", parameter=name)
    return name.removesuffix(".weight")


def _config(adapter: Adapter, rank: int, scale: float, forms: Mapping[str, tuple[LowRank, Any]]) -> dict[str, Any]:
    """Return the sidecar: the source's own where it still holds, else the fields that mlx-lm reads."""
    source = dict(adapter.meta.config) if adapter.meta.source == "mlx" else {}
    said = source.get("lora_parameters", {})
    if source and (said.get("rank"), said.get("scale")) == (rank, scale):
        return source
    dora = any(magnitude is not None for _, magnitude in forms.values())
    return {
        **source,
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": source.get("num_layers", -1),
        "lora_parameters": {
            **said,
            "rank": rank,
            "scale": scale,
            "dropout": said.get("dropout", 0.0),
            "keys": said.get("keys") or _keys(forms),
        },
        **({} if adapter.meta.base_id is None or source else {"model": adapter.meta.base_id}),
    }


def _keys(names: Iterable[str]) -> list[str]:
    """Return module paths relative to their block, or whole for modules outside the blocks."""
    found: dict[str, None] = {}
    for name in names:
        segments = name.removesuffix(".weight").split(".")
        at = [i for i in range(len(segments) - 2) if segments[i] in _BLOCKS and segments[i + 1].isdecimal()]
        found[".".join(segments[at[0] + 2 :]) if at else name.removesuffix(".weight")] = None
    return sorted(found)


FORMATS.add("mlx")(Mlx())
