"""Pictures of a comparison as PNG files, drawn by matplotlib (extra ``plot``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loratools.errors import FileError
from loratools.report import Report

DPI = 150
DARK = 0.7  # from here on the colour maps need white figures
MATRICES = ("cosine", "interference", "sign_conflict")


def plots(report: Report, folder: Path) -> list[Path]:
    """Write ``cosine.png``, ``interference.png``, ``sign_conflict.png`` and ``dendrogram.png``; return their paths.

    Adapters stand in the order of the dendrogram (average linkage of 1 - cosine), so that communities form blocks.
    """
    names = list(report.extra["names"])
    if len(names) < 2:
        return []
    tree = linkage(_matrix(report, names, "cosine", diagonal=1.0))
    order = _leaves(tree)
    figures = {figure: _heat(report, [names[i] for i in order], figure) for figure in MATRICES}
    figures["dendrogram"] = _dendrogram(tree, names)
    return [_saved(figure, folder / f"{name}.png") for name, figure in figures.items()]


def linkage(similarity: Sequence[Sequence[float]]) -> Any:
    """Return SciPy's average linkage of the distances 1 - similarity."""
    from scipy.cluster.hierarchy import linkage as link

    size = len(similarity)
    return link([1.0 - similarity[i][j] for i in range(size) for j in range(i + 1, size)], "average")


def _leaves(tree: Any) -> list[int]:
    from scipy.cluster.hierarchy import leaves_list

    return [int(i) for i in leaves_list(tree)]


def _matrix(report: Report, names: Sequence[str], figure: str, *, diagonal: float) -> list[list[float]]:
    found = {frozenset((row["a"], row["b"])): row[figure] for row in report.modules}
    return [
        [
            diagonal if a == b else float(value) if (value := found[frozenset((a, b))]) is not None else 0.0
            for b in names
        ]
        for a in names
    ]


def _heat(report: Report, names: Sequence[str], figure: str) -> Any:
    from matplotlib.figure import Figure

    drawn = Figure(figsize=_size(len(names)), layout="constrained")
    axes = drawn.add_subplot()
    low, high, colours = (-1.0, 1.0, "RdBu_r") if figure == "cosine" else (0.0, 1.0, "Blues")
    values = _matrix(report, names, figure, diagonal=float("nan"))
    picture = axes.imshow(values, vmin=low, vmax=high, cmap=colours)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    if len(names) <= 12:
        for i, line in enumerate(values):
            for j, value in enumerate(line):
                if i != j:
                    colour = "white" if abs(value) > DARK else "black"
                    axes.text(j, i, f"{value:z.2f}", ha="center", va="center", fontsize=6, color=colour)
    axes.set_title(figure.replace("_", " "), fontsize=9)
    drawn.colorbar(picture, ax=axes, shrink=0.7)
    return drawn


def _dendrogram(tree: Any, names: Sequence[str]) -> Any:
    from matplotlib.figure import Figure
    from scipy.cluster.hierarchy import dendrogram

    drawn = Figure(figsize=(6, 1.5 + 0.22 * len(names)), layout="constrained")
    axes = drawn.add_subplot()
    dendrogram(tree, labels=list(names), orientation="left", ax=axes, leaf_font_size=7)
    axes.set_xlabel("1 - cosine of the updates (average linkage)", fontsize=8)
    return drawn


def _size(count: int) -> tuple[float, float]:
    side = min(20.0, 3.0 + 0.22 * count)
    return side + 1, side


def _saved(figure: Any, path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI)
    except OSError as error:
        raise FileError("cannot write the picture", file=path, got=error.strerror) from error
    return path
