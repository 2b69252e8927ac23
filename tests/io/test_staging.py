from __future__ import annotations

import os
from pathlib import Path

import pytest

from loratools.errors import ExistsError, FileError, MismatchError
from loratools.io.staging import Staging


def opened(target: Path, job: dict[str, int], *, resume: bool = False, overwrite: bool = False) -> Staging:
    staging = Staging(target, job, overwrite=overwrite)
    staging.open(resume=resume)
    return staging


def test_finished_files_become_the_output_at_once(tmp_path: Path) -> None:
    staging = opened(tmp_path / "out", {"a": 1})
    staging.write_text("one.txt", "1")
    staging.write_text("figures", "2")
    assert staging.has("one.txt")
    assert not (tmp_path / "out").exists()
    staging.finish(("figures",))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["one.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_unfinished_file_never_bears_its_name(tmp_path: Path) -> None:
    staging = opened(tmp_path / "out", {})
    with pytest.raises(RuntimeError), staging.file("one.bin") as fd:
        os.write(fd, b"half")
        raise RuntimeError
    assert not staging.has("one.bin")
    assert {p.name for p in staging.path.iterdir()} == {"job.json"}


def test_only_the_same_job_is_continued(tmp_path: Path) -> None:
    opened(tmp_path / "out", {"a": 1}).write_text("one.txt", "1")
    with pytest.raises(ExistsError, match="unfinished job"):
        opened(tmp_path / "out", {"a": 1})
    with pytest.raises(MismatchError, match="another one") as caught:
        opened(tmp_path / "out", {"a": 2}, resume=True)
    assert caught.value.got == "different a"
    assert opened(tmp_path / "out", {"a": 1}, resume=True).has("one.txt")
    assert not opened(tmp_path / "out", {"a": 1}, overwrite=True).has("one.txt")


def test_an_existing_output_is_not_replaced_unasked(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ExistsError, match="exists already"):
        opened(tmp_path / "out", {})
    staging = opened(tmp_path / "out", {}, overwrite=True)
    staging.write_text("x", "new")
    staging.finish()
    assert (tmp_path / "out" / "x").read_text() == "new"


def test_one_file_alone(tmp_path: Path) -> None:
    (tmp_path / "out.txt").write_text("old")
    staging = opened(tmp_path / "out.txt", {}, overwrite=True)
    staging.write_text("inner.txt", "new")
    staging.finish(only="inner.txt")
    assert (tmp_path / "out.txt").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out.txt"]


def test_an_error_keeps_finished_work_and_says_so(tmp_path: Path) -> None:
    staging = opened(tmp_path / "out", {})
    with pytest.raises(FileError), staging.kept_if(("a", "b")):
        raise FileError("full")
    assert not staging.path.exists()
    staging = opened(tmp_path / "out", {})
    with pytest.raises(FileError) as caught, staging.kept_if(("a", "b")):
        staging.write_text("a", "1")
        raise FileError("full", hint="free some space")
    assert "free some space; 1 of 2 files are finished: --resume" in str(caught.value.hint)
    assert staging.has("a")
    staging.discard()
    assert not staging.path.exists()
