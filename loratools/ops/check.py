"""check: would the program that receives a file load it, and apply it right?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loratools.consumers.base import CONSUMERS, FAILS, Finding
from loratools.consumers.subject import Subject, read
from loratools.errors import LoratoolsError
from loratools.files import BaseLike, open_base
from loratools.report import Report
from loratools.sarif import Item

UNITS = {
    "errors": "findings that stop the file, or change what it does",
    "warnings": "findings that depend on what the file does not say",
    "notes": "what to know; a note does not fail a check",
    "passed": "pairs of file and consumer without errors and warnings",
}
MOST_NAMED = 50


def check(
    paths: str | Path | Sequence[str | Path],
    consumer: str | Sequence[str],
    *,
    base: BaseLike | None = None,
    format: str | None = None,
    max_rank: int | None = None,
) -> Report:
    """Return what would go wrong with adapter files in the programs that are to receive them.

    ``consumer`` is one or more names of :data:`loratools.consumers.base.CONSUMERS`; ``base`` lets names and shapes be
    judged; ``max_rank`` is the limit that the server was started with. Costs one read of the tensors; nothing is
    written. ``extra["findings"]`` has one row per finding, ``checks`` one per file and consumer. A file among several
    that is no container of tensors is a finding; alone, it raises what opening it raises.
    """
    files = [Path(p) for p in ([paths] if isinstance(paths, str | Path) else paths)]
    names = [consumer] if isinstance(consumer, str) else list(consumer)
    opened = open_base(base)
    profiles = [CONSUMERS[name] for name in names]
    found: list[tuple[Path, str, list[Finding]]] = []
    inputs: list[dict[str, Any]] = []
    for file in files:
        try:
            subject = read(file, format=format, base=opened, limit=max_rank)
        except LoratoolsError as error:
            if len(files) == 1:
                raise
            inputs.append({"path": str(file), "format": None, "sha256": None})
            found += [(file, p.name, [_unopened(p.name, error)]) for p in profiles]
            continue
        inputs.append({"path": str(subject.bundle.path), "format": subject.format, "sha256": None})
        found += [(file, p.name, list(p.judge(subject))) for p in profiles]
    return reported(found, inputs)


def judged(subject: Subject, consumer: str) -> list[Finding]:
    """Return the findings about one file that is open already."""
    return list(CONSUMERS[consumer].judge(subject))


def reported(found: Iterable[tuple[Path, str, list[Finding]]], inputs: Iterable[dict[str, Any]]) -> Report:
    """Return the report of findings per file and consumer."""
    checks: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    modules: list[dict[str, Any]] = []
    for file, consumer, findings in found:
        bad = [f for f in findings if f.level != "note"]
        name = f"{file} for {consumer}"
        checks.append({"expr": f"loads right in {consumer}", "module": str(file), "value": len(bad), "ok": not bad})
        modules.append({"name": name, "file": str(file), "consumer": consumer, "verdict": verdict(findings),
                        "errors": _count(findings, "error"), "warnings": _count(findings, "warning"),
                        "notes": _count(findings, "note")})  # fmt: skip
        rows += [{"file": str(file), **_row(f)} for f in findings]
    total = {figure: sum(m[figure] for m in modules) for figure in ("errors", "warnings", "notes")}
    total |= {"files": len({m["file"] for m in modules}), "passed": sum(c["ok"] for c in checks)}
    return Report("loratools.check/1", tuple(modules), total, UNITS, inputs=tuple(inputs), checks=tuple(checks),
                  extra={"findings": rows})  # fmt: skip


def verdict(findings: Sequence[Finding]) -> str:
    """Return the worst effect in words; ``loads right`` where there is none."""
    order = {"error": 0, "warning": 1, "note": 2}
    bad = sorted((f for f in findings if f.level != "note"), key=lambda f: (order[f.level], f.effect != FAILS))
    return bad[0].effect if bad else "loads right"


def items(report: Report) -> list[Item]:
    """Return the findings of a report for SARIF and annotations."""
    return [
        Item(
            row["id"], row["level"], f"{row['effect']}: {row['evidence']}; {row['reason']}", row["file"],
            row["modules"][0] if row["modules"] else "", row["mend"], f"{row['reason']} [{row['source']}]",
        )
        for row in report.extra["findings"]
    ]  # fmt: skip


def _count(findings: Sequence[Finding], level: str) -> int:
    return sum(f.level == level for f in findings)


def _row(finding: Finding) -> dict[str, Any]:
    return {**asdict(finding), "level": finding.level, "modules": list(finding.modules[:MOST_NAMED]),
            "module_count": len(finding.modules)}  # fmt: skip


def _unopened(consumer: str, error: LoratoolsError) -> Finding:
    what = " ".join(str(error).split())
    return Finding(f"{consumer}/unreadable", consumer, FAILS, what, (), "the file holds no tensors", "loratools",
                   error.hint or "download or save it again")  # fmt: skip
