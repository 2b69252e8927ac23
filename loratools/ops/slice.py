"""slice: the leading channels of a nested adapter, at the scale that its training gave that rank.

Trainers agree on the factors and differ in the scale of a slice; a plain LoRA file says alpha, and readers apply alpha
over its rank. With s the scale at all R channels, the rules for N of them are

keep            s                 channels in an order of their own (``squeeze --nested``), ``lora_scaling`` none
alpha-over-r    s R / N           alpha stays: kohya's splitter, DyLoRA in LyCORIS, ``lora_scaling`` rank
sqrt            s sqrt(R / N)     alpha stays under rsLoRA; the factor of kohya's training, ``lora_scaling`` sqrt

LyCORIS counts blocks instead of channels, alpha / (N / block size), also at full rank, where its own loader and all
others apply alpha / R: there ``block_size`` multiplies s. A MatryoshkaLoRA file stores no s; its three scalings are the
three rules with alpha = 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import sqrt
from typing import Any, NamedTuple

from loratools.core.adapter import Adapter, Meta
from loratools.core.lazy import lazily
from loratools.core.update import Update, namespace, nbytes
from loratools.errors import MismatchError, MissingScaleError, UsageError
from loratools.kinds.lowrank import LowRank, low_ranks, with_low_ranks
from loratools.linalg import factored
from loratools.linalg.channels import channels, prefix_errors
from loratools.linalg.select import tail_error
from loratools.ops.ranks import Target
from loratools.report import Report

RULES = ("keep", "alpha-over-r", "sqrt")
UNITS = {
    "rank_before": "channels as stored",
    "rank_after": "channels as written",
    "scale_before": "factor of b @ a at full rank, as it was trained",
    "scale_after": "factor of b @ a of the slice",
    "relative_error": "|slice - whole| / |whole|, Frobenius, each at its own scale",
    "prefix_error": "the same with both at the full rank's scale: what leaving out the other channels costs",
    "optimal_error": "what the best update of that rank would lose",
    "bytes_before": "bytes of the stored tensors",
    "bytes_after": "bytes of the written tensors",
}


class Squares(NamedTuple):
    """|D|^2, and the squared errors that :data:`ERRORS` name, Frobenius."""

    whole: float
    relative: float
    prefix: float
    optimal: float


ERRORS = ("relative_error", "prefix_error", "optimal_error")


class Trainer(NamedTuple):
    """The program that trained a nested adapter, as its metadata say: ``unit`` channels were trained at a time."""

    name: str
    unit: int


def slice(adapter: Adapter, *, rank: int, scale_rule: str, block_size: int | None = None) -> Adapter:
    """Return the adapter of the leading ``rank`` channels of every module, their bits untouched.

    ``scale_rule`` is one of :data:`RULES`; ``block_size`` multiplies the scale of files whose trainer counted blocks
    (DyLoRA in LyCORIS; 1 is what loaders apply). ``report`` of the result tells scales and errors. Cost
    O((m + n) R^2) per module, for the errors alone. Raises UsageError for another rule or rank and for a file of
    LyCORIS' DyLoRA without ``block_size``, MismatchError for modules of a smaller rank (the first three and the count),
    MissingScaleError where a file does not tell its scale and the rule needs it.
    """
    Target(rank=rank)  # refuses what is no rank
    if scale_rule not in RULES:
        raise UsageError("no such scale rule", expected=", ".join(RULES), got=scale_rule)
    trainer, blocks = trainer_of(adapter.meta), _blocks(adapter.meta, rank, block_size)
    found = {name: us for name, u in adapter.items() if (us := low_ranks(u)) is not None}
    _check_ranks(found, rank)
    rows: dict[str, Mapping[str, Any]] = {}
    squares: dict[str, Squares] = {}

    def cut(name: str, update: Update) -> Update:
        if name not in found:
            return update
        whole = [replace(u, scale=_full_scale(u, scale_rule, adapter.meta) * blocks) for u in found[name]]
        parts = [_leading(u, rank, scale_rule) for u in whole]
        done = with_low_ranks(update, parts)
        squares[name] = _squares(whole, parts)
        rows[name] = {
            "name": name,
            "kind": update.kind,
            "rank_before": whole[0].rank,
            "rank_after": rank,
            "scale_before": whole[0].scale,
            "scale_after": parts[0].scale,
            **_errors([squares[name]]),
            "bytes_before": nbytes(update),
            "bytes_after": nbytes(done),
        }
        return done

    done = adapter.map(cut)
    words = f"rank={rank} {scale_rule}" + (f" block_size={block_size}" if block_size else "")
    carried = [name for name in adapter if name not in found and adapter[name].kind not in ("dense", "replace")]
    total = {
        "modules": len(rows),
        "rank_before": max(us[0].rank for us in found.values()),
        "rank_after": rank,
        **_errors(list(squares.values())),
        **{f"bytes_{when}": sum(row[f"bytes_{when}"] for row in rows.values()) for when in ("before", "after")},
    }
    said = _remarks(trainer, rank, scale_rule, carried, adapter.meta)
    report = Report("loratools.slice/1", tuple(rows[n] for n in found), total, UNITS, said, extra={"target": words})
    settled = adapter.meta.scaled or adapter.meta.source == "matryoshka"
    meta = replace(done.meta, scaled=settled, remarks=() if settled else done.meta.remarks)
    return replace(done, meta=meta, report=report).with_history(f"slice {words}")


def trainer_of(meta: Meta) -> Trainer | None:
    """Return which DyLoRA trained the file, as sd-scripts' metadata tell; None where they do not."""
    module = meta.metadata.get("ss_network_module", "")
    args = _args(meta)
    if module == "networks.dylora":
        return Trainer("kohya", _count(args.get("unit"), 1))
    if module.startswith("lycoris") and str(args.get("algo", "")).lower() == "dylora":
        return Trainer("lycoris", _count(args.get("block_size"), 4))
    return None


def _args(meta: Meta) -> Mapping[str, Any]:
    try:
        args = json.loads(meta.metadata.get("ss_network_args") or "null")
    except ValueError:
        return {}
    return args if isinstance(args, dict) else {}


def _count(value: Any, default: int) -> int:
    text = str(value or default)
    return int(text) if text.isdecimal() and int(text) else default


def _blocks(meta: Meta, rank: int, block_size: int | None) -> int:
    """Return the factor of the scale that a trainer's blocks make."""
    trainer = trainer_of(meta)
    if block_size is None and trainer is not None and trainer.name == "lycoris" and trainer.unit > 1:
        raise UsageError(
            "LyCORIS trained this DyLoRA at alpha over the number of its blocks, and every loader applies alpha over r",
            file=meta.path, hint=f"--block-size {trainer.unit}: as it was trained; --block-size 1: as it is loaded",
        )  # fmt: skip
    if block_size is not None and (isinstance(block_size, bool) or block_size < 1 or rank % block_size):
        raise UsageError(
            "the rank is no whole number of blocks", expected="a multiple of the block size", got=block_size
        )
    return block_size or 1


def _check_ranks(found: Mapping[str, Sequence[LowRank]], rank: int) -> None:
    if not found:
        raise UsageError("the adapter has no channels to slice")
    small = [f"{name}: {us[0].rank}" for name, us in found.items() if us[0].rank < rank]
    if small:
        raise MismatchError(
            f"{len(small)} of {len(found)} modules have fewer channels than the slice",
            expected=f"at least {rank}",
            got="; ".join(small[:3]),
        )


def _full_scale(u: LowRank, rule: str, meta: Meta) -> float:
    """Return the scale at all channels: the file's, or MatryoshkaLoRA's s(R) under the rule."""
    if meta.scaled or (rule == "keep" and meta.source != "matryoshka"):
        return u.scale  # an unknown scale can be kept
    if meta.source != "matryoshka":
        raise MissingScaleError(
            f"a {meta.source} file does not say how strongly its factors act",
            hint="loratools convert IN --scale NUMBER says it",
        )
    return {"keep": 1.0, "alpha-over-r": 1.0 / u.rank, "sqrt": 1.0 / sqrt(u.rank)}[rule]


def _leading(u: LowRank, rank: int, rule: str) -> LowRank:
    growth = {"keep": 1.0, "alpha-over-r": u.rank / rank, "sqrt": sqrt(u.rank / rank)}[rule]
    b = lazily(u.b, (u.matrix_shape[0], rank), lambda x: x[:, :rank])
    a = lazily(u.a, (rank, u.matrix_shape[1]), lambda x: x[:rank, :])
    return LowRank(b, a, u.scale * growth, u.shape)


def _squares(whole: Sequence[LowRank], parts: Sequence[LowRank]) -> Squares:
    """Measure one parameter, summed over experts."""
    found = [_measured(u, v) for u, v in zip(whole, parts, strict=True)]
    return Squares(*(sum(column) for column in zip(*found, strict=True)))


def _measured(u: LowRank, v: LowRank) -> Squares:
    found = channels(*u.factors(), u.scale)
    size = float((found.s**2).sum())
    best = tail_error(found.s, min(v.rank, int(found.s.shape[0]))) if size else 0.0
    return Squares(size, _distance(u, v) ** 2, size * prefix_errors(found)[v.rank] ** 2, size * best**2)


def _errors(found: Sequence[Squares]) -> dict[str, float]:
    whole, *errors = (sum(column) for column in zip(*found, strict=True))
    return {name: sqrt(x / whole) if whole else 0.0 for name, x in zip(ERRORS, errors, strict=True)}


def _distance(u: LowRank, v: LowRank) -> float:
    """Return |D_v - D_u|: the same channels at other scales, so that every one has a weight of its own."""
    b, a = u.factors("float64")
    grown = b[:, : v.rank] * (v.scale - u.scale)
    return factored.frobenius(namespace(b).concat([grown, -u.scale * b[:, v.rank :]], axis=1), a)


def _remarks(trainer: Trainer | None, rank: int, rule: str, carried: Sequence[str], meta: Meta) -> tuple[str, ...]:
    said = []
    if trainer is not None and rank % trainer.unit:
        said.append(f"{trainer.name} trained channels in units of {trainer.unit}: rank {rank} was never used alone")
    if trainer is not None and rule == "keep":
        said.append(f"trained by DyLoRA of {trainer.name}, whose slices do not keep the scale of the full rank")
    if rule != "keep" and any(line.startswith("squeeze") and "nested" in line for line in meta.history):
        said.append(
            "squeeze --nested ordered these channels: their slices are optimal at the scale of the full rank (keep)"
        )
    if carried:
        more = f" and {len(carried) - 3} more" if len(carried) > 3 else ""
        said.append(f"without channels, carried as they are: {', '.join(carried[:3])}{more}")
    return tuple(said)
