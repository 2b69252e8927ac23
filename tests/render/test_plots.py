"""Pictures are written where there is something to draw."""

from __future__ import annotations

from pathlib import Path

import pytest

import loratools as lt
from loratools.render.plots import plots
from loratools.report import Report

pytest.importorskip("matplotlib")
PNG = b"\x89PNG\r\n\x1a\n"


def test_every_picture(digits: Path, tmp_path: Path) -> None:
    steps = [lt.load(digits / name) for name in ("r1", "r4")]
    written = plots(lt.diagnose(steps, base=digits / "base"), tmp_path / "new" / "folder")
    names = {
        "map-share",
        "map-relative_norm",
        "map-effective_rank",
        "map-intruders",
        "spectra",
        "energy",
        "intruders",
        "history",
    }
    assert {path.stem for path in written} == names
    assert all(path.read_bytes().startswith(PNG) and path.stat().st_size > 5000 for path in written)


def test_without_a_base_there_are_no_intruders_to_draw(digits: Path, tmp_path: Path) -> None:
    stems = {path.stem for path in plots(lt.diagnose(lt.load(digits / "r4")), tmp_path)}
    assert stems == {"map-share", "map-effective_rank", "spectra", "energy"}
    assert plots(Report("loratools.diagnose/1"), tmp_path) == []
