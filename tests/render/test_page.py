"""The page holds everything it needs, says what the report says, and draws in a browser without an error."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import loratools as lt
from loratools.ops.whole_model import whole_model
from loratools.render.html import page
from loratools.report import Report

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


@pytest.fixture(scope="module")
def report() -> Report:
    digits = Path(__file__).parents[2] / "fixtures" / "digits"
    steps = [lt.load(digits / name) for name in ("r1", "r4")]
    return lt.diagnose(steps, base=digits / "base", rank_curve=True)


def test_nothing_is_fetched(report: Report) -> None:
    text = page(report, title="an adapter")
    without_data = re.sub(r'<script type="application/json".*?</script>', "", text, flags=re.DOTALL)
    assert set(re.findall(r"https?://[^\"' )]+", without_data)) == {
        "http://www.w3.org/2000/svg"
    }  # a namespace, not a place
    assert not re.search(r"(src|href)=|@import|url\(", without_data)


def test_the_data_are_the_report(report: Report) -> None:
    text = page(report, title="an adapter")
    body = json.loads(re.search(r'id="data">(.*?)</script>', text, flags=re.DOTALL)[1])
    said = report.to_dict()
    assert body["summary"] == said["summary"]
    assert [row["name"] for row in body["modules"]] == [row["name"] for row in said["modules"]]
    assert body["total"]["intruders"] == said["total"]["intruders"]
    assert body["modules"][0]["share"] == pytest.approx(said["modules"][0]["share"], rel=1e-5)  # six digits


def test_names_cannot_break_out() -> None:
    evil = "</script><script>alert(1)</script>%%SCRIPT%%"
    report = Report("loratools.diagnose/1", extra={"summary": [evil], "request": {"k": 1, "eps": 0.5, "base": None}})
    text = page(report, title=evil)
    assert text.count("<script>") == 1
    assert text.count("</script>") == 2
    assert "alert(1)</script>" not in text


def drawn(text: str, folder: Path) -> str:
    """Return the page's DOM after its script ran; errors in it land in the body."""
    trap = "<script>window.onerror = (m) => { document.body.dataset.error = m; };</script>"
    path = folder / "page.html"
    path.write_text(text.replace("<body>", f"<body>{trap}", 1))
    argv = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder}",
        "--dump-dom",
        path.as_uri(),
    ]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_a_browser_draws_every_section(report: Report, tmp_path: Path) -> None:
    dom = drawn(page(report, title="an adapter"), tmp_path)
    assert "data-error" not in dom
    for section in ("map", "spectra", "energy", "intruders", "curve", "attention", "ranks", "history", "table"):
        part = re.search(rf'<section[^>]*id="{section}".*?</section>', dom, flags=re.DOTALL)[0]
        assert "hidden" not in part.split(">")[0]
        assert "<svg" in part or "<td" in part, section
    assert dom.count("<rect") >= 16 + 160  # a cell per module, and per module and direction
    assert report.extra["summary"][0] in dom


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_a_browser_draws_what_there_is(tmp_path: Path, digits: Path) -> None:
    plain = lt.diagnose(lt.load(digits / "r4"))
    tuned = lt.diagnose(whole_model(digits / "tuned"), base=digits / "base")
    empty = Report(
        "loratools.diagnose/1", extra={"summary": ["nothing"], "request": {"k": 10, "eps": 0.5, "base": None}}
    )
    for i, one in enumerate((plain, tuned, empty)):
        (tmp_path / str(i)).mkdir()
        assert "data-error" not in drawn(page(one, title="x"), tmp_path / str(i))
