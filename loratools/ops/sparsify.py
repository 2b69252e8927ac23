"""shira: an update as its most important entries (SHiRA, arXiv:2406.13175), with an optional part of low rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite

from loratools.core.adapter import Adapter
from loratools.core.generic import need_delta
from loratools.core.update import Delta, Leaf, Update
from loratools.errors import ConversionError, LoratoolsError, UsageError
from loratools.files import BaseLike, open_base
from loratools.formats.base import FORMATS
from loratools.io.base import Base
from loratools.kinds.lowrank import LowRank, canonical, low_rank
from loratools.kinds.sparse import Sparse, of_entries
from loratools.kinds.sum import Sum
from loratools.linalg import factored
from loratools.linalg.namespace import dtype_name, up
from loratools.ops import masks, touched
from loratools.ops.gather import Kept, Source, gather_all, gather_each
from loratools.ops.sparse_report import Figures, sparse_report
from loratools.ops.sums import minus
from loratools.outputs import file_bytes
from loratools.report import Report

SCOPES = ("module", "global")
HALVES = ("float16", "bfloat16")


@dataclass(frozen=True)
class Sparsity:
    """How many entries, chosen how, and what goes with them. ``to`` is the format that will hold the result.

    Raises UsageError where the settings are out of range or contradict each other.
    """

    density: float
    mask: str = "magnitude"
    scope: str = "module"
    rank: int | None = None
    to: str = "peft"

    def __post_init__(self) -> None:
        if isinstance(self.density, bool) or not isinstance(self.density, int | float) or not isfinite(self.density):
            raise UsageError("density is no number", expected="a share of the entries, e.g. 0.01", got=self.density)
        if not 0 < self.density <= 1:
            raise UsageError("density out of range", expected="a share above 0 and at most 1", got=self.density)
        masks.checked(self.mask)
        if self.scope not in SCOPES:
            raise UsageError("unknown scope", expected=" or ".join(SCOPES), got=self.scope)
        if self.rank is not None and (isinstance(self.rank, bool) or self.rank < 1):
            raise UsageError("rank of the low-rank part out of range", expected="at least 1", got=self.rank)
        if self.to not in ("peft", "native"):
            raise UsageError("sparse adapters are written as peft or native", got=self.to)
        if self.to == "peft" and self.scope == "global":
            raise UsageError("PEFT's layout fixes the number of values per module", got="scope global", hint=_TO)
        if self.to == "peft" and self.rank is not None:
            raise UsageError("PEFT's layout has no place for a low-rank part", got=f"rank {self.rank}", hint=_TO)
        if self.scope == "global" and self.mask == "struct":
            raise UsageError("the mask struct is laid out module by module", got="scope global")

    @property
    def words(self) -> str:
        """The settings, for the history."""
        more = f" plus rank {self.rank}" if self.rank else ""
        return f"density {self.density:g}, mask {self.mask}, scope {self.scope}{more}"


_TO = "the native format holds it: --to native"


def shira(
    adapter: Adapter,
    *,
    density: float,
    mask: str = "magnitude",
    scope: str = "module",
    plus_lowrank: int | None = None,
    base: BaseLike | None = None,
    keep_base: bool = False,
    to: str = "peft",
    dtype: str | None = None,
    seed: int = 0,
) -> Adapter:
    """Return the adapter whose every matrix update keeps the share ``density`` of its entries.

    ``mask``: ``magnitude`` (the best approximation with so many entries, Frobenius), ``weight``, ``snip`` (both need
    ``base``), ``random``, ``struct``; ``scope`` ``module`` counts per module, ``global`` over all of them.
    ``plus_lowrank``: first the best update of this rank, then the entries of what it leaves (kind ``sum``). For ``to``
    = ``peft`` every module gets r (in + out) entries with the largest r that ``density`` allows; ConversionError where
    that is 0. With ``base`` the result remembers a hash of the base's values at its entries, with ``keep_base`` these
    values themselves (native only). Values are stored in ``dtype``: by default 16 bit, the input's own or bfloat16.

    What is stored whole (biases, heads) is carried. Entries are formed a block of rows at a time, twice. The report
    holds retained energy, error and sizes in every layout.
    """
    how = Sparsity(density, mask, scope, plus_lowrank, to)
    opened = open_base(base)
    if keep_base and (opened is None or to == "peft"):
        raise UsageError("keeping base values needs a base and the native format", hint="pass --base and --to native")
    parts = _parts(adapter, opened, how, dtype)
    weights = _weights(opened, parts)
    done, figures = sparsified(parts, weights, how, seed=seed, dtype=dtype)
    if keep_base:
        done = {name: touched.with_base(u, weights[name]) for name, u in done.items()}
    updates = {name: done.get(name, u) for name, u in adapter.items()}
    meta = replace(adapter.meta, metadata=touched.forgotten(adapter.meta.metadata))
    if opened is not None and done:
        meta = replace(meta, metadata={**meta.metadata, touched.KEY: touched.hash_of(done, weights)})
    made = Adapter(updates, replace(meta, absorbed={}))
    told = adapter.meta.remarks
    report = sparse_report("shira", figures, how.words, before=adapter, after=made, told=told, asked=density)
    return replace(made.with_history(f"shira {how.words}"), report=with_sizes(report, made))


@dataclass(frozen=True)
class Part:
    """One update to be thinned: the whole of it, its low-rank part, and what that leaves."""

    whole: Delta
    low: LowRank | None
    rest: Delta
    dtype: str


def _parts(adapter: Adapter, base: Base | None, how: Sparsity, dtype: str | None) -> dict[str, Part]:
    """Return every matrix update; coats are opened with their base. Replacements and vectors are carried."""
    coats = [n for n, u in adapter.items() if _is_coat(u)]
    found = base.resolve(coats) if base is not None and coats else {}
    parts = {}
    for name, u in adapter.items():
        if u.kind in ("replace", "replace_rows", "rebased") or len(u.shape) < 2:
            continue
        try:
            whole = u.delta(base[found[name]]) if name in found and base is not None else need_delta(u)
            parts[name] = part_of(whole, how.rank, dtype or _half(u))
        except LoratoolsError as error:
            raise error.at(parameter=name) from error
    if not parts:
        raise ConversionError("the adapter holds no matrix update to thin out", got=f"{len(adapter)} others")
    return parts


def part_of(whole: Delta, rank: int | None, dtype: str) -> Part:
    """Return an update with its best part of low rank, as it will be stored, taken off."""
    low = None if rank is None else _low(whole, rank, dtype)
    return Part(whole, low, whole if low is None else minus(whole, low), dtype)


def _is_coat(u: Update) -> bool:
    return not isinstance(u, Delta) and u.kind not in ("replace", "replace_rows", "rebased")


def _half(u: Update) -> str:
    """Return the 16-bit dtype of an update's tensors, or bfloat16, whose range holds every fp32 value."""
    from loratools.core.update import tensors

    names = {dtype_name(t) for _, t in tensors(u)}
    return next((name for name in HALVES if name in names), "bfloat16")


def _low(whole: Delta, rank: int, dtype: str) -> LowRank:
    flat = low_rank(whole)
    if flat is not None:
        k = min(rank, flat.rank)
        return canonical(flat, factored.truncate(flat.b, flat.a, lambda _: k, scale=flat.scale), dtype=dtype)
    from loratools.core import generic
    from loratools.linalg.namespace import down

    left, s, right = generic.svd(whole, min(rank, *whole.matrix_shape))
    root = s**0.5
    return LowRank(down(left * root, dtype), down(root[:, None] * right, dtype), 1.0, whole.shape)


def _weights(base: Base | None, parts: Mapping[str, Part]) -> dict[str, Leaf]:
    """Return the base parameter of every part, checked for its shape."""
    if base is None:
        return {}
    found = base.resolve(parts)
    weights = {name: base.leaf(found[name]) for name in parts}
    for name, leaf in weights.items():
        touched.check_shape(name, parts[name].whole.shape, leaf, base.path)
    return weights


def sparsified(
    parts: Mapping[str, Part], weights: Mapping[str, Leaf], how: Sparsity, *, seed: int, dtype: str | None = None
) -> tuple[dict[str, Delta], dict[str, Figures]]:
    """Return the thinned updates and their figures."""
    shapes = {name: part.whole.shape for name, part in parts.items()}
    counts = counts_for(shapes, how)
    sources = [
        Source(n, p.rest, masks.Scorer(how.mask, n, _matrix(p.rest.shape), counts[n], weights.get(n), seed))
        for n, p in parts.items()
    ]
    kept = gather_all(sources, sum(counts.values())) if how.scope == "global" else gather_each(sources, counts)
    done: dict[str, Delta] = {}
    figures: dict[str, Figures] = {}
    for name, part in parts.items():
        sparse = of_entries(kept[name].flat, kept[name].values, part.whole.shape, dtype=part.dtype)
        done[name] = sparse if part.low is None else Sum((part.low, sparse))
        figures[name] = _figures(part, kept[name], sparse)
    return done, figures


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    size = 1
    for n in shape[1:]:
        size *= n
    return shape[0], size


def _figures(part: Part, kept: Kept, sparse: Sparse) -> Figures:
    """Return what the module keeps and loses; |D|^2 is the whole update's, also where a low-rank part is taken off."""
    from loratools.core import generic

    square = kept.square if part.low is None else generic.norm(part.whole) ** 2
    values = up(kept.values, "float64")
    rounding = up(sparse.values, "float64") - values
    caught, lost = float((values * values).sum()), float((rounding * rounding).sum())
    left = max(kept.square - caught, 0.0)
    low_rank_square = square - kept.square  # what the low-rank part explains, to first order in its rounding
    return Figures(square, caught + max(low_rank_square, 0.0), left + lost, sparse.nnz, sparse.density)


def counts_for(shapes: Mapping[str, tuple[int, ...]], how: Sparsity) -> dict[str, int]:
    """Return how many entries each module keeps. ConversionError where PEFT's layout has no such number."""
    sizes = {name: m * n for name, (m, n) in ((name, _matrix(s)) for name, s in shapes.items())}
    if how.to == "native":
        return {name: max(1, round(how.density * size)) for name, size in sizes.items()}
    odd = next((name for name, s in shapes.items() if len(s) != 2), None)
    if odd is not None:
        raise ConversionError("PEFT's SHiRA knows nn.Linear alone", parameter=odd, got=shapes[odd], hint=_TO)
    most = min(sizes[name] // sum(s) for name, s in shapes.items())
    r = min(most, int(how.density * sum(sizes.values()) / sum(map(sum, shapes.values())) + 1e-9))
    if r < 1:
        least = sum(map(sum, shapes.values())) / sum(sizes.values())
        raise ConversionError(
            "no legal size for PEFT's layout: it needs r (in + out) values per module with r of at least 1",
            expected=f"a density of at least {least:.4g}" if most else "modules of more than in + out entries",
            got=how.density,
            hint=_TO,
        )
    return {name: r * sum(s) for name, s in shapes.items()}


def with_sizes(report: Report, made: Adapter) -> Report:
    """Add what the weights file would take in each layout; null where the layout cannot hold it."""
    sizes = {f"bytes_{name}": _file_size(made, name) for name in ("native", "peft")}
    return report.with_(total={**report.total, **sizes})


def _file_size(made: Adapter, name: str) -> int | None:
    try:
        return file_bytes(FORMATS[name].encode(made))
    except LoratoolsError:
        return None
