"""Files and annotations that a diagnosis leaves: checked before the work, written after it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from loratools.errors import ExistsError, FileError, MissingExtraError
from loratools.gates import Gate
from loratools.report import Report


@dataclass(frozen=True)
class Outputs:
    """Where the page, the pictures and the SARIF log go; None: nowhere."""

    html: Path | None
    plots: Path | None
    sarif: Path | None

    def check(self, *, overwrite: bool) -> None:
        """Raise before any work what writing would raise: an existing target, a missing folder or extra."""
        for path in (self.html, self.sarif):
            if path is not None:
                if path.exists() and (not overwrite or path.is_dir()):
                    raise ExistsError("the output exists already", file=path, hint="pass --overwrite, or another name")
                if not path.absolute().parent.is_dir():
                    raise FileError("there is no such folder to write to", file=path.parent)
        if self.plots is not None:
            if self.plots.exists() and (not self.plots.is_dir() or (any(self.plots.iterdir()) and not overwrite)):
                hint = "pass --overwrite, or an empty directory"
                raise ExistsError("the directory of pictures is not empty", file=self.plots, hint=hint)
            _require_matplotlib()

    def write(self, report: Report, gates: Sequence[Gate], *, title: str) -> None:
        """Write what was asked for."""
        from loratools.io.write import write_text

        if self.html is not None:
            from loratools.render.html import page

            write_text(self.html, page(report, title=title), overwrite=True)
        if self.sarif is not None:
            from loratools.gates import items
            from loratools.sarif import sarif

            write_text(self.sarif, json.dumps(sarif(items(gates, report)), indent=1) + "\n", overwrite=True)
        if self.plots is not None:
            from loratools.render.plots import plots

            plots(report, self.plots)


def annotate(report: Report, gates: Sequence[Gate]) -> None:
    """Print failed gates as GitHub annotations where this is a GitHub Actions run; stderr, for stdout may be JSON."""
    if os.environ.get("GITHUB_ACTIONS") != "true":
        return
    from loratools.gates import items
    from loratools.sarif import workflow_commands

    for line in workflow_commands(items(gates, report)):
        click.echo(line, err=True)


def _require_matplotlib() -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise MissingExtraError("--plots needs matplotlib", hint="pip install 'loratools[plot]'")
