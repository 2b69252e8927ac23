"""Pictures of a diagnosis as PNG files, drawn by matplotlib (extra ``plot``)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loratools.errors import FileError
from loratools.report import Report

Row = Mapping[str, Any]
DPI = 150
MAPS = ("share", "relative_norm", "effective_rank", "intruders")


def plots(report: Report, folder: Path) -> list[Path]:
    """Write the pictures that the report has figures for into ``folder`` and return their paths.

    ``map-FIGURE.png`` (layer x projection), ``spectra.png``, ``energy.png``, ``intruders.png``, ``history.png``.
    """
    from matplotlib.figure import Figure

    rows = sorted((row for row in report.modules if row.get("matrix")), key=lambda row: _natural(row["name"]))
    if not rows:
        return []
    figures: dict[str, Any] = {}
    for figure in MAPS:
        if any(row.get(figure) is not None for row in rows):
            figures[f"map-{figure}"] = _map(Figure, rows, figure, report.units.get(figure, figure))
    if any(row.get("singular_values") for row in rows):
        figures["spectra"] = _lines(Figure, rows, "singular_values", "singular value", log=True)
        figures["energy"] = _lines(Figure, rows, "energy", "share of the squared norm", log=False)
    if any(row.get("max_cosine_upper") for row in rows):
        figures["intruders"] = _intruders(Figure, rows, report.extra["request"]["eps"])
    if report.extra.get("history"):
        figures["history"] = _history(Figure, report.extra["history"])
    return [_saved(figure, folder / f"{name}.png") for name, figure in figures.items()]


def _saved(figure: Any, path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI)
    except OSError as error:
        raise FileError("cannot write the picture", file=path, got=error.strerror) from error
    return path


def _map(make: Any, rows: Sequence[Row], figure: str, meaning: str) -> Any:
    layers, projections = (list(dict.fromkeys(row[by] for row in rows)) for by in ("layer", "projection"))
    projections.sort()
    grid = [[float("nan")] * len(projections) for _ in layers]
    for row in rows:
        if row.get(figure) is not None:
            grid[layers.index(row["layer"])][projections.index(row["projection"])] = float(row[figure])
    drawn, axes = _axes(make, 2.5 + 0.9 * len(projections), 1.8 + 0.3 * len(layers))
    picture = axes.imshow(grid, aspect="auto", cmap="Blues", vmin=0)
    axes.set_xticks(range(len(projections)), projections, rotation=35, ha="right")
    axes.set_yticks(range(len(layers)), layers)
    axes.set_title(meaning, fontsize=9)
    drawn.colorbar(picture, ax=axes, shrink=0.8)
    return drawn


def _lines(make: Any, rows: Sequence[Row], figure: str, label: str, *, log: bool) -> Any:
    drawn, axes = _axes(make, 7, 4.5)
    projections = sorted({row["projection"] for row in rows})
    for row in rows:
        values = row.get(figure) or []
        colour = f"C{projections.index(row['projection']) % 10}"
        axes.plot(
            range(1, len(values) + 1), values, color=colour, alpha=0.5, lw=1, marker="." if len(values) < 3 else ""
        )
    for projection in projections[:10]:
        axes.plot([], [], color=f"C{projections.index(projection) % 10}", label=projection)
    if log:
        axes.set_yscale("log")
    axes.set_xlabel("index" if log else "rank")
    axes.set_ylabel(label)
    axes.legend(fontsize=8, frameon=False)
    axes.grid(alpha=0.25)
    return drawn


def _intruders(make: Any, rows: Sequence[Row], eps: float) -> Any:
    judged = [row for row in rows if row.get("max_cosine_upper")]
    width = max(len(row["max_cosine_upper"]) for row in judged)
    grid = [[*row["max_cosine_upper"], *[float("nan")] * (width - len(row["max_cosine_upper"]))] for row in judged]
    drawn, axes = _axes(make, 5 + 0.35 * width, 1.5 + 0.22 * len(judged))
    picture = axes.imshow(grid, aspect="auto", cmap="RdBu", vmin=max(0.0, 2 * eps - 1), vmax=min(1.0, 2 * eps))
    axes.set_xticks(range(width), range(1, width + 1))
    axes.set_yticks(range(len(judged)), [row["name"].removesuffix(".weight") for row in judged], fontsize=7)
    axes.set_title(
        f"largest cosine with a left singular vector of the base (upper bound); below {eps:g}: intruder", fontsize=9
    )
    drawn.colorbar(picture, ax=axes, shrink=0.8)
    return drawn


def _history(make: Any, history: Sequence[Row]) -> Any:
    figures = [f for f in ("frobenius_norm", "effective_rank", "intruders") if history[-1]["total"].get(f) is not None]
    drawn = make(figsize=(4 * len(figures), 3.6), layout="constrained")
    for axes, figure in zip(drawn.subplots(1, len(figures), squeeze=False)[0], figures, strict=True):
        for values in zip(*([module.get(figure) for module in step["modules"]] for step in history), strict=True):
            axes.plot(range(1, len(history) + 1), [float("nan") if v is None else v for v in values], alpha=0.5, lw=1)
        axes.set_xticks(range(1, len(history) + 1))
        axes.set_xlabel("checkpoint")
        axes.set_title(figure.replace("_", " "), fontsize=9)
        axes.grid(alpha=0.25)
    return drawn


def _axes(make: Any, width: float, height: float) -> tuple[Any, Any]:
    drawn = make(figsize=(width, height), layout="constrained")
    return drawn, drawn.subplots()


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"[.\[\]]", name)]
