"""extract --sparse: the entries of a full fine-tune that moved most, with an optional part of low rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from loratools.core.adapter import Adapter, Meta
from loratools.core.update import Update
from loratools.errors import LoratoolsError, MismatchError, UsageError
from loratools.files import BaseLike, open_base
from loratools.io.base import Base
from loratools.io.quantised import refuse_quantised
from loratools.kinds.lowrank import LowRank
from loratools.kinds.replace import Replace
from loratools.linalg.namespace import is_float
from loratools.ops import touched
from loratools.ops.decompose import Plan, decomposed
from loratools.ops.difference import is_same
from loratools.ops.extract_config import config_and_layout
from loratools.ops.pairing import Pairing, paired
from loratools.ops.ranks import Target
from loratools.ops.sparse_report import sparse_report
from loratools.ops.sparsify import HALVES, Part, Sparsity, sparsified, with_sizes
from loratools.ops.streamed import Streamed
from loratools.ops.sums import minus
from loratools.ops.tied import tie_of


def extract_sparse(
    base: BaseLike,
    tuned: BaseLike,
    *,
    density: float,
    mask: str = "magnitude",
    scope: str = "module",
    plus_lowrank: int | None = None,
    carry: bool = True,
    keep_base: bool = False,
    to: str = "peft",
    dtype: str | None = None,
    seed: int = 0,
) -> Adapter:
    """Return the sparse adapter that leads from ``base`` towards ``tuned``: of every changed matrix the top entries.

    ``density``, ``mask``, ``scope``, ``plus_lowrank``, ``keep_base``, ``to`` and ``dtype`` as for
    :func:`loratools.ops.sparsify.shira`, of which this is the counterpart on two checkpoints. Both are streamed, a
    block of rows at a time, twice: a histogram, then an exact gathering (a low-rank part forms one difference at a
    time). The adapter remembers a hash of the base's values under its entries. What is no matrix is kept whole where it
    changed, or with ``carry`` = False only named. Raises as :func:`loratools.ops.extract.extract`.
    """
    how = Sparsity(density, mask, scope, plus_lowrank, to)
    if keep_base and to == "peft":
        raise UsageError("PEFT's layout has no place for base values", hint="--to native")
    if dtype is not None and not is_float(dtype):
        raise UsageError("no floating dtype to store values in", expected="float16, bfloat16, float32", got=dtype)
    old, new = _model(base), _model(tuned)
    pairing = paired(old, new)
    changed = {n: s for n, s in pairing.low_rank.items() if not is_same(old.leaf(s), new.leaf(n))}
    if not changed:
        raise MismatchError(
            "no matrix differs between the two models", file=new.path, got=f"{len(pairing.low_rank)} equal"
        )
    parts = {name: _part(name, old, new, source, how, dtype, seed) for name, source in changed.items()}
    weights = {name: old.leaf(source) for name, source in changed.items()}
    done, figures = sparsified(parts, weights, how, seed=seed)
    remembered = touched.hash_of(done, weights)
    if keep_base:
        done = {name: touched.with_base(u, weights[name]) for name, u in done.items()}
    whole = _whole(old, new, pairing)
    found: dict[str, Update] = {**done, **({n: Replace(new.leaf(n)) for n in whole} if carry else {})}
    updates = {name: found[name] for name in new if name in found}
    tie = tie_of(new)
    tied = tie is not None and tie.embedding in updates and tie.head not in updates
    config, layout = config_and_layout(updates, old, _id(old), tied=tied)
    meta = Meta(format="peft", namespace="hf", base_id=_id(old), config=config, layout=layout,
                metadata={touched.KEY: remembered})  # fmt: skip
    told = [*pairing.remarks, *([] if carry or not whole else [f"changed and left out: {', '.join(whole[:3])}"])]
    made = Adapter(updates, meta).with_history(f"extract sparse {how.words}")
    report = sparse_report("extract", figures, how.words, after=made, asked=density, told=told)
    return replace(made, report=with_sizes(report, made))


def _model(source: BaseLike) -> Base:
    opened = open_base(source)
    assert opened is not None  # only None opens as None
    refuse_quantised(opened)
    return opened


def _id(base: Base) -> str | None:
    said = base.config.get("_name_or_path")
    return str(said) if said else None if base.path is None else str(Path(base.path).resolve())


def _part(name: str, old: Base, new: Base, source: str, how: Sparsity, dtype: str | None, seed: int) -> Part:
    """Return one difference, and its low-rank part as it will be stored, taken off."""
    leaf = new.leaf(name)
    stored = dtype or (leaf.dtype if leaf.dtype in HALVES else "bfloat16")
    whole = Streamed(old.leaf(source), leaf)
    if how.rank is None:
        return Part(whole, None, whole, stored)
    try:
        low, _ = decomposed(name, old.leaf(source), leaf, Plan(Target(rank=how.rank), False, seed, stored))
    except LoratoolsError as error:
        raise error.at(parameter=name) from error
    if not isinstance(low, LowRank):
        raise UsageError(
            "a stack of experts takes no low-rank part here", parameter=name, hint="leave --plus-lowrank out"
        )
    return Part(whole, low, minus(whole, low), stored)


def _whole(old: Base, new: Base, pairing: Pairing) -> list[str]:
    """Return what changed and is no matrix, of floating dtype."""
    return [
        name for name, source in pairing.whole.items()
        if is_float(new.dtypes[name]) and (source is None or not is_same(old.leaf(source), new.leaf(name)))
    ]  # fmt: skip
