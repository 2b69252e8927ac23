"""A report as one self-contained page: data, style and the code that draws it in a single file, no network."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from loratools.report import Report

DIGITS = 6
"""Significant digits of the figures on the page; the JSON report has them all."""


def page(report: Report, *, title: str) -> str:
    """Return the page of a diagnosis. It opens in any browser of this decade, from disk, light and dark."""
    body = {**report.to_dict(), "units": dict(report.units), "title": title}
    data = json.dumps(_rounded(body), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {"STYLE": _part("page.css"), "SCRIPT": _part("page.js"), "DATA": data, "TITLE": _text(title)}
    template = _part("page.html")
    for name, text in parts.items():  # the data come last but one, and nothing is replaced inside them
        before, _, after = template.partition(f"%%{name}%%")
        template = before + text + after
    return template


def _part(name: str) -> str:
    return files("loratools.render").joinpath(name).read_text("utf-8")


def _text(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
