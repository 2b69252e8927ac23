"""Adapters trained on a base that their own initialisation changed: PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ, KaSA.

The file holds B and A; the base was W0 - s B0 A0 while they were trained (KaSA: W0 without its r smallest singular
triplets, which stand in for s B0 A0 here). Relative to W0 the update is s B A - s B0 A0, of rank at most 2 r. Stored
side by side the two products would cancel in half precision wherever they are used, so the difference is decomposed
again, in fp64, into balanced factors of its own size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import sqrt
from statistics import median
from typing import Any

from loratools.core.adapter import Adapter
from loratools.core.update import Update
from loratools.errors import MismatchError, NeedsBaseError, NumericsError, UnsupportedError
from loratools.files import BaseLike, open_base
from loratools.formats.peft.config import altered_base, altered_words
from loratools.formats.peft.lora_config import ALTERED
from loratools.io.base import Base
from loratools.kinds.lowrank import LowRank, canonical, low_rank, with_low_rank
from loratools.linalg import factored
from loratools.linalg.dense import thin_svd
from loratools.linalg.namespace import namespace, up
from loratools.report import Report, Row

BY_BASE = ("pissa", "olora", "kasa")  # what was taken from the base follows from the base alone
UNSURE = 1e-2  # relative error from which a recomputed initial product is not unique enough
EPS32 = 1.2e-7
ALIKE = 0.5  # cosine of a factor with its start: training moves it little, and another's start is about orthogonal
UNITS = {
    "rank_before": "columns of the factors as stored",
    "rank_after": "columns of the factors relative to the original base",
    "update_norm": "Frobenius norm of the update relative to the original base",
    "cancelled": "Frobenius norm of the initial product / update_norm: what was never learned",
    "similarity": "cosine of a with that of the initial adapter: near 1 for the start of the same training",
    "uncertainty": "error of the recomputed initial product / update_norm, estimated (0 with --initial)",
}


def initialisation(config: Mapping[str, Any]) -> str | None:
    """Return how the base was altered when training began (``pissa``, ``pissa_niter_4``, ``kasa`` ...), or None."""
    init = altered_base(config)
    return None if init is None else init.lower()


def refuse_altered(adapters: Sequence[Adapter], *, altered_base: bool) -> None:
    """Raise UnsupportedError for an adapter that is relative to an altered base, unless the base is said to be that."""
    for adapter in adapters:
        init = initialisation(adapter.meta.config)
        if init is not None and not altered_base:
            raise UnsupportedError(
                f"{altered_words(adapter.meta.config)} changed the base when training began: on the original base "
                "this adapter would be wrong",
                file=adapter.meta.path,
                hint=f"{advice(init)}; or pass --altered-base if BASE is the altered model saved at that time",
            )


def recover(adapter: Adapter, *, initial: Adapter | None = None, base: BaseLike | None = None) -> Adapter:
    """Return the adapter relative to the original base, as plain LoRA of rank 2 r, re-orthogonalised.

    ``initial``: the adapter as it was saved before the first step; exact then. Without it, ``base`` (the original one)
    gives what ``pissa`` (not ``pissa_niter_*``: random), ``olora`` and ``kasa`` took away, where it is unique; PiSSA
    and KaSA cost one full SVD per module. A DoRA keeps its magnitude, with the recovered direction.

    Raises UnsupportedError (with the reason) where neither can work, NeedsBaseError, MismatchError for an initial
    adapter of other modules, NumericsError where the initial product is not unique.
    """
    init = initialisation(adapter.meta.config)
    if init is None:
        raise UnsupportedError(
            "this adapter is relative to the original base already", file=adapter.meta.path,
            got=f"init_lora_weights={adapter.meta.config.get('init_lora_weights')!r}",
        )  # fmt: skip
    opened = open_base(base)
    _check_possible(init, initial, opened, cut=ALTERED in adapter.meta.config)
    rows: list[Row] = []
    updates: dict[str, Update] = {}
    for name, update in adapter.items():
        learned = low_rank(update)
        if learned is None:
            updates[name] = update
            continue
        start, unsure = _start(name, learned, init, initial, opened, adapter)
        updates[name], row = _difference(name, update, learned, start, unsure)
        rows.append({**row, "similarity": None if initial is None else _similarity(learned, start)})
    meta = replace(
        adapter.meta,
        config=_plain(adapter.meta.config),
        remarks=tuple(r for r in adapter.meta.remarks if "changed the base when training began" not in r),
        absorbed={},
    )
    how = "its initial adapter" if initial is not None else "the base"
    done = Adapter(updates, meta).with_history(f"recover from {init} by {how}")
    return replace(done, report=_report(rows, init, done))


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config without its word of an altered base."""
    kept = {key: value for key, value in config.items() if key != ALTERED}
    return kept | {"init_lora_weights": True} | ({"kasa_config": None} if "kasa_config" in config else {})


def _check_possible(init: str, initial: Adapter | None, base: Base | None, *, cut: bool) -> None:
    if initial is not None:
        if init == "kasa":
            raise UnsupportedError(
                "KaSA took the smallest singular triplets from the base; its initial adapter does not hold them",
                hint="pass --base with the original base instead: they follow from it",
            )
        return
    if init not in BY_BASE:
        raise UnsupportedError(
            f"the initial factors of {init} cannot be computed again: they depend on {_cause(init)}",
            hint="pass --initial DIR, the adapter as it was saved before training",
        )
    if cut:
        raise UnsupportedError(
            f"the ranks of this {init} adapter were changed after training: what it took from the base had others",
            hint="recover the adapter as it was trained, and squeeze the result",
        )
    if base is None:
        raise NeedsBaseError(f"{init} took something from the base when training began", hint=advice(init))


def _cause(init: str) -> str:
    if "niter" in init:
        return "a randomised decomposition"
    return "the quantiser used in training" if init == "loftq" else "the training data"


def advice(init: str) -> str:
    """Return how an adapter of an altered base is made plain, in words."""
    ways = [*(["--initial DIR (IN as saved before training)"] if init != "kasa" else []),
            *(["--base BASE (the original one)"] if init in BY_BASE else [])]  # fmt: skip
    return f"loratools recover IN {' or '.join(ways)} makes it plain LoRA"


def _start(
    name: str, learned: LowRank, init: str, initial: Adapter | None, base: Base | None, adapter: Adapter
) -> tuple[LowRank, float]:
    """Return s B0 A0 and the estimated absolute error of its recomputation."""
    if initial is not None:
        found = low_rank(initial[name]) if name in initial else None
        if found is None or found.shape != learned.shape:
            raise MismatchError(
                "the initial adapter does not have this module", file=initial.meta.path, parameter=name,
                expected=learned.shape, got="nothing" if found is None else found.shape,
            )  # fmt: skip
        if not factored.frobenius(found.b, found.a, scale=found.scale):
            raise MismatchError(
                f"the initial adapter changes nothing here: {init} did not begin like that",
                file=initial.meta.path, parameter=name, expected="the adapter that was saved before training",
            )  # fmt: skip
        return found, 0.0
    assert base is not None  # _check_possible
    stored = base.resolve([name])[name]
    if base.shapes[stored] != learned.shape:
        raise MismatchError(
            "the base has another shape", parameter=name, expected=learned.shape, got=base.shapes[stored]
        )
    if init == "olora" and adapter.meta.layout.get(name, {}).get("stored") == "in_out":
        raise UnsupportedError("OLoRA on a transposed (Conv1D) parameter: not recomputed", parameter=name)
    w = up(base[stored], "float64")
    return _BY_BASE[init](w, learned) if w.ndim == 2 else _refuse(name)


def _similarity(learned: LowRank, start: LowRank) -> float | None:
    """Return the cosine of a with its start: training moves factors little; None where the ranks differ."""
    a, a0 = up(learned.a, "float64"), up(start.a, "float64")
    if a.shape != a0.shape:
        return None
    xp = namespace(a)
    return float(xp.sum(a * a0)) / sqrt(max(float(xp.sum(a * a)) * float(xp.sum(a0 * a0)), 1e-300))


def _refuse(name: str) -> tuple[LowRank, float]:
    raise UnsupportedError("the initial factors of a convolution are not recomputed", parameter=name)


def _pissa(w: Any, learned: LowRank) -> tuple[LowRank, float]:
    """Return the r leading singular triplets of W; the gap behind them says how well fp32 determined them."""
    u, s, vh = thin_svd(w)
    r = min(learned.rank, int(s.shape[0]))
    first, last, after = float(s[0]), float(s[r - 1]), float(s[r]) if r < s.shape[0] else 0.0
    return LowRank(u[:, :r] * s[:r], vh[:r, :]), _turning(first, last, after, r)


def _kasa(w: Any, learned: LowRank) -> tuple[LowRank, float]:
    """Return the r smallest singular triplets of W, which PEFT's KaSA removes from the base (arXiv:2412.06071)."""
    u, s, vh = thin_svd(w)
    keep = int(s.shape[0]) - learned.rank
    if keep < 1:
        raise MismatchError("KaSA leaves at least one singular value", expected=f"a rank below {s.shape[0]}",
                            got=learned.rank)  # fmt: skip
    product = LowRank(u[:, keep:] * s[keep:], vh[keep:, :])
    return product, _turning(float(s[0]), float(s[keep - 1]), float(s[keep]), learned.rank)


def _turning(first: float, last: float, after: float, r: int) -> float:
    """Return the error of a product of singular triplets that end at a gap last - after, where fp32 turned them."""
    return 4 * EPS32 * first * (1.0 + last / max(last - after, 1e-300)) * sqrt(r)


def _olora(w: Any, learned: LowRank) -> tuple[LowRank, float]:
    """Return Q_r R_r of the QR of W: W projected on its first r columns, whatever the signs."""
    xp = namespace(w)
    q = xp.linalg.qr(w[:, : learned.rank])[0]
    s = xp.linalg.svdvals(w[:, : learned.rank])
    condition = float(s[0]) / max(float(s[-1]), 1e-300)
    product = LowRank(q, q.T @ w, learned.scale)
    return product, 4 * EPS32 * condition * abs(learned.scale) * float(xp.linalg.matrix_norm(q.T @ w))


_BY_BASE = {"pissa": _pissa, "olora": _olora, "kasa": _kasa}


def _difference(
    name: str, update: Update, learned: LowRank, start: LowRank, unsure: float
) -> tuple[Update, dict[str, Any]]:
    b, a = (up(x, "float64") for x in (learned.b, learned.a))
    b0, a0 = (up(x, "float64") for x in (start.b, start.a))
    xp = namespace(b, b0)
    tall = xp.concat([learned.scale * b, -start.scale * b0], axis=1)
    result = factored.truncate(tall, xp.concat([a, a0], axis=0), lambda s: int(s.shape[0]))
    norm = float(xp.sum(result.singular_values**2)) ** 0.5
    if unsure > UNSURE * norm:
        raise NumericsError(
            "the initial product cannot be recomputed from the base: its singular values do not part clearly",
            parameter=name,
            expected=f"an error below {UNSURE:g} of the update",
            got=f"{unsure / norm if norm else float('inf'):.2g}",
            hint="pass --initial DIR, the adapter as it was saved before training",
        )
    row = {
        "name": name,
        "rank_before": learned.rank,
        "rank_after": result.rank,
        "update_norm": norm,
        "cancelled": factored.frobenius(b0, a0, scale=start.scale) / norm if norm else None,
        "uncertainty": unsure / norm if norm else 0.0,
    }
    return with_low_rank(update, canonical(learned, result)), row


def _report(rows: Sequence[Row], init: str, done: Adapter) -> Report:
    total = {
        "modules": len(rows),
        "rank_before": max((row["rank_before"] for row in rows), default=None),
        "rank_after": max((row["rank_after"] for row in rows), default=None),
        "update_norm": sum(row["update_norm"] ** 2 for row in rows) ** 0.5,
        "uncertainty": max((row["uncertainty"] for row in rows), default=0.0),
    }
    alike = [row["similarity"] for row in rows if row["similarity"] is not None]
    doubt = (
        [f"the initial adapter hardly resembles this one (median cosine {median(alike):.2f}): is it of this training?"]
        if alike and median(alike) < ALIKE
        else []
    )
    loftq = ["LoftQ: exact up to what its quantised start missed of the original weights"] if init == "loftq" else []
    return Report("loratools.recover/1", tuple(rows), total, UNITS, (*done.meta.remarks, *loftq, *doubt))
