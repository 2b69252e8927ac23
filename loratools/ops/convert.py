"""convert: an adapter in kinds that another format can say, by the cheapest exact routes; loss only when allowed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from loratools.core.adapter import Adapter
from loratools.core.update import Update, nbytes
from loratools.errors import LoratoolsError, UsageError
from loratools.files import BaseLike, open_base
from loratools.formats.base import FORMATS
from loratools.formats.bfl import fused_sizes
from loratools.formats.blocks import is_block_diagonal
from loratools.formats.names import renamed
from loratools.io.base import Base
from loratools.kinds.dora import Dora
from loratools.kinds.lowrank import LowRank
from loratools.ops.altered import BY_BASE, initialisation, recover, refuse_altered
from loratools.ops.bottlenecks import refuse_bottlenecks
from loratools.ops.reroute import Target, converted
from loratools.ops.types.base import retyped
from loratools.report import Report, Row

UNITS = {
    "route": "kinds from the input's to the output's",
    "rank_before": "columns of the factors as stored, where there are factors",
    "rank_after": "columns of the factors as written, where there are factors",
    "relative_error": "||written - original|| / ||original||, Frobenius; 0 on exact routes, 1 where left out; in total "
    "the worst",
    "type_error": "with --type: the same figure of all updates whose type changed, together",
    "bytes_before": "bytes of the tensors",
    "bytes_after": "bytes of the tensors in the new kind",
}


ROUNDING = 1e-5  # relative errors that are no news: fp32 factors of what has that rank


def convert(
    adapter: Adapter,
    to: str,
    *,
    base: BaseLike | None = None,
    lossy: bool = False,
    scale: float | None = None,
    rename: tuple[str, ...] = (),
    split_alpha: bool = False,
    type: str | None = None,
    rank: int | None = None,
    initial: Adapter | None = None,
    altered_base: bool = False,
    seed: int = 0,
    **settings: Any,
) -> Adapter:
    """Return the adapter in kinds that the format ``to`` can say; save it with ``format=to``.

    Every update takes the cheapest exact route over the graph of kinds; a coat whose convention the format does not
    share becomes the full difference where the ``base`` is given. With ``lossy``, inexact routes are taken where no
    exact one leads there, and updates that the format cannot hold at all are left out; both are measured in the report.
    ``scale`` says how strongly the factors act where the source does not; ``rename`` are ``REGEX=REPL`` rules on
    parameter names. ``split_alpha`` takes the alpha of Flux' fused projections that are block-diagonal as that of one
    block, as sd-scripts trains them with ``split_qkv``. Cost: nothing for updates that stay as they are.

    ``type`` makes the adapter one of :data:`loratools.ops.types.base.TYPES` first (``lora``, ``dora`` ...), with
    ``rank``, ``seed`` and the type's own ``settings``; what that costs is in the report, too. An adapter of an altered
    base (PiSSA, ...) becomes plain LoRA of the original one by its ``initial`` adapter or, where that is enough, by
    ``base``; ``altered_base`` says that the receiver has the altered one. Its own format keeps it as it is.

    Raises :class:`ConversionError` naming the update and the best lossy route, :class:`UsageError` for a scale that
    the source already says, UnsupportedError for an adapter of an altered base that stays one unawares.
    """
    format = FORMATS[to]
    opened = open_base(base)
    own = to in (adapter.meta.source, "native") and type is None
    if not own:
        refuse_bottlenecks(adapter)
    plain, warnings = _plain(_scaled(adapter, scale), initial, opened, keep=altered_base or own)
    named, odd = _split_alphas(_renamed(plain, rename), split_alpha)
    before, made = dict(zip(named, adapter.values(), strict=True)), {}
    if type is not None:
        named = retyped(named, type, base=opened, rank=rank, seed=seed, settings=settings)
        made = {row["name"]: row for row in _report_of(named).modules}
    elif rank is not None or settings:
        raise UsageError("a rank and settings belong to a type", expected="--type", got=rank or ", ".join(settings))
    warnings += [*odd, *([] if named.report is None else named.report.warnings)]
    warnings += _losses(list(made.values()), type, named)
    own = to == adapter.meta.source and type is None
    done: dict[str, Update] = {}
    rows: list[dict[str, Any]] = []
    for name, u in named.items():
        try:
            new, route, error = converted(u, Target(format, named, name, own), opened, lossy)
        except LoratoolsError as problem:
            raise problem.at(parameter=name, file=adapter.meta.path) from problem
        if new is not None:
            done[name] = new
        rows.append(_row(before[name], new, route, error, name, made.get(name)))
    meta = named.meta
    dropped = [row["name"] for row in rows if row["kind_after"] is None]
    warnings += [f"{len(dropped)} updates are left out: {', '.join(dropped[:3])}"] if dropped else []
    if meta.leftover and to not in (meta.source, "native"):
        warnings.append(f"{len(meta.leftover)} carried tensors are left behind: {', '.join(list(meta.leftover)[:3])}")
    total = _total(to, adapter, rows, named)
    report = Report("loratools.convert/1", tuple(rows), total, UNITS, warnings=tuple(warnings))
    lossless = all(row["relative_error"] == 0.0 for row in rows)
    line = f"converted from {meta.source} to {to}" + ("" if lossless else ", with loss")
    history = meta.history if to in (meta.source, "native") and lossless else (*meta.history, line)
    return Adapter(done, replace(meta, history=history), report)


def _plain(adapter: Adapter, initial: Adapter | None, base: Base | None, *, keep: bool) -> tuple[Adapter, list[str]]:
    """Return an adapter of the original base, and what to tell: recovered by ``initial`` or the base, or kept as told.

    Raises UnsupportedError where an adapter of an altered base would lose the word that it is one.
    """
    init = initialisation(adapter.meta.config)
    if initial is not None or (init in BY_BASE and base is not None and not keep):
        done = recover(adapter, initial=initial, base=base)
        total = _report_of(done).total
        told = f"made plain LoRA of the original base from {init}: rank {total['rank_before']} -> {total['rank_after']}"
        return replace(done, report=None), [told, *_report_of(done).warnings[len(done.meta.remarks) :]]
    if not keep:
        refuse_altered([adapter], altered_base=False)
    return replace(adapter, report=None), []


def _report_of(adapter: Adapter) -> Report:
    assert adapter.report is not None  # of the operation that made it
    return adapter.report


def _losses(made: Collection[Row], type: str | None, typed: Adapter) -> list[str]:
    """Return one line on what a new type costs, where that is more than rounding."""
    lossy = [row for row in made if row["relative_error"] > ROUNDING]
    if not lossy:
        return []
    worst = max(lossy, key=lambda row: float(row["relative_error"]))
    return [
        f"{len(lossy)} of {len(typed)} updates are only near as {type}: relative error "
        f"{_report_of(typed).total['relative_error']:.3g} together, {worst['relative_error']:.3g} at worst "
        f"({worst['name']})"
    ]


def _scaled(adapter: Adapter, scale: float | None) -> Adapter:
    """Return the adapter with the scale that its file does not say."""
    if scale is None:
        return adapter
    if adapter.meta.scaled:
        raise UsageError("--scale: the input says its scale itself", got=adapter.meta.source)
    updates = {name: _at_scale(u, scale) for name, u in adapter.items()}
    return replace(adapter, updates=updates, meta=replace(adapter.meta, scaled=True))


def _at_scale(u: Update, scale: float) -> Update:
    if isinstance(u, Dora) and isinstance(u.direction, LowRank):
        return replace(u, direction=replace(u.direction, scale=u.direction.scale * scale))
    return replace(u, scale=u.scale * scale) if isinstance(u, LowRank) else u


def _split_alphas(adapter: Adapter, assume: bool) -> tuple[Adapter, list[str]]:
    """Find fused projections of kohya's files that were trained in parts; scale them as trained, or warn."""
    if adapter.meta.source not in ("kohya", "lycoris"):
        return adapter, []
    found: dict[str, int] = {}
    for name, u in adapter.items():
        path = name.removeprefix("diffusion_model.").removesuffix(".weight")
        sizes = fused_sizes(path, u) if isinstance(u, LowRank) else None
        if sizes and isinstance(u, LowRank) and is_block_diagonal(u, sizes):
            found[name] = len(sizes)
    if not found or assume:
        done = {n: _at_scale(u, float(found.get(n, 1))) for n, u in adapter.items()}
        return replace(adapter, updates=done), []
    first = next(iter(found))
    return adapter, [
        f"{len(found)} fused projections are block-diagonal, as split_qkv trains them ({first}): sd-scripts "
        f"applies {found[first]} times what their alpha says to other readers; --assume-split-alpha writes it so"
    ]


def _renamed(adapter: Adapter, rules: tuple[str, ...]) -> Adapter:
    """Return the adapter under new names; what a file said about a renamed update is forgotten."""
    if not rules:
        return adapter
    names = renamed(adapter, rules)
    layout: Mapping[str, Any] = {names[n]: _kept(n, names[n], e) for n, e in adapter.meta.layout.items() if n in names}
    meta = replace(adapter.meta, layout={n: e for n, e in layout.items() if e})
    return replace(adapter, updates={names[n]: u for n, u in adapter.items()}, meta=meta)


def _kept(old: str, new: str, layout: Mapping[str, Any]) -> Mapping[str, Any]:
    return layout if old == new else {k: v for k, v in layout.items() if k == "stored"}


def _row(
    old: Update, new: Update | None, route: list[str], error: float, name: str, made: Row | None
) -> dict[str, Any]:
    if old.kind != route[0]:
        route = [old.kind, *route]
    if made is not None:
        error = made["relative_error"] + (1.0 + made["relative_error"]) * error if new is not None else error
    return {
        "name": name,
        "kind_before": old.kind,
        "kind_after": None if new is None else new.kind,
        "route": " -> ".join(route) if new is not None else f"{old.kind} -> left out",
        "rank_before": _rank(old),
        "rank_after": None if new is None else _rank(new),
        "relative_error": error,
        "bytes_before": nbytes(old),
        "bytes_after": 0 if new is None else nbytes(new),
    }


def _rank(u: Update) -> int | None:
    inner = u.direction if isinstance(u, Dora) else u
    return inner.rank if isinstance(inner, LowRank) else None


def _total(to: str, adapter: Adapter, rows: list[dict[str, Any]], typed: Adapter) -> dict[str, Any]:
    routes: dict[str, int] = {}
    for row in rows:
        routes[row["route"]] = routes.get(row["route"], 0) + 1
    return {
        "from": adapter.meta.source,
        "to": to,
        "updates": len(rows),
        "routes": routes,
        "relative_error": max((row["relative_error"] for row in rows), default=0.0),
        **({} if typed.report is None else {"type_error": typed.report.total["relative_error"]}),
        "bytes_before": sum(row["bytes_before"] for row in rows),
        "bytes_after": sum(row["bytes_after"] for row in rows),
    }
