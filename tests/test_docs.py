"""The documentation is true: help pages are the program's, examples run, links lead somewhere, lists are complete."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from loratools.cli.main import main
from loratools.core.update import KINDS
from loratools.formats.base import FORMATS
from loratools.fusion.base import FUSIONS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CLI = ROOT / "docs" / "cli.md"


def cli_page() -> str:
    """Return docs/cli.md as it should be."""
    pages = [("loratools", ["--help"]), *((f"loratools {name}", [name, "--help"]) for name in main.list_commands(None))]  # type: ignore[arg-type]
    parts = ["# Command line\n\nGenerated from the program; `tests/test_docs.py` compares.\n"]
    for title, args in pages:
        result = CliRunner().invoke(main, args, prog_name="loratools", terminal_width=100)
        parts.append(f"## {title}\n\n```text\n{result.output.rstrip()}\n```\n")
    return "\n".join(parts)


def test_help_pages_are_those_of_the_program() -> None:
    if os.environ.get("LORATOOLS_WRITE_DOCS"):
        CLI.write_text(cli_page())
    assert CLI.read_text() == cli_page(), "run LORATOOLS_WRITE_DOCS=1 pytest tests/test_docs.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples may use ``adapter`` and ``base``: a PEFT directory and its base model."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    if not blocks:
        return
    shutil.copytree(ROOT / "fixtures" / "digits" / "r32", tmp_path / "adapter")
    shutil.copytree(ROOT / "fixtures" / "digits" / "base", tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)


@pytest.mark.parametrize("name", list(FUSIONS))
def test_every_fusion_method_is_explained(name: str) -> None:
    assert f"`{name}`" in (ROOT / "docs" / "fuse.md").read_text()


@pytest.mark.parametrize("name", list(KINDS))
def test_every_kind_is_in_the_table(name: str) -> None:
    assert f"| `{name}` |" in (ROOT / "docs" / "kinds.md").read_text()


@pytest.mark.parametrize("name", list(FORMATS))
def test_every_format_is_in_the_table(name: str) -> None:
    text = (ROOT / "docs" / "formats.md").read_text()
    assert f"| `{name}`" in text or f"| [`{name}`](formats/{name}.md)" in text


def test_every_command_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    for name in main.list_commands(None):  # type: ignore[arg-type]
        assert f"loratools {name}" in text, name


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        if page.name != "index.md" and page.parent.name == "docs":
            assert f"({page.name})" in index, page.name


def test_the_project_speaks_of_itself_alone() -> None:
    """No machine paths or registry hosts in what is shipped."""
    suspicious = re.compile(r"/work/|/root/|/home/|pypi\.org|files\.pythonhosted")
    for path in [
        *PAGES,
        *ROOT.glob("loratools/**/*.py"),
        *ROOT.glob("cli/*.py"),
        *ROOT.glob("kernels/*.py"),
        *ROOT.glob("docs/bench/*.json"),
    ]:
        found = suspicious.search(path.read_text())
        assert not found, f"{path.relative_to(ROOT)}: {found and found[0]}"
