"""A killed merge continues at the first unfinished shard, and never leaves a file that looks finished."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from loratools.core.adapter import Adapter
from loratools.errors import ExistsError, FileError, MismatchError
from loratools.files import load, save
from loratools.io import output as io_output
from loratools.kinds.dora import Dora
from loratools.kinds.lowrank import LowRank
from loratools.ops.merge import merge

SHARDS, NAMES = 4, [f"model.layers.{i}.q_proj.weight" for i in range(8)]


@pytest.fixture
def job(model: Callable[..., Path], tmp_path: Path, rng: np.random.Generator) -> tuple[Path, Path]:
    """A base in four shards, and a PEFT adapter with and without magnitudes on the disk."""
    tensors = {name: rng.standard_normal((256, 128)).astype(np.float16) for name in NAMES}
    tensors["model.norm.weight"] = np.ones(128, np.float16)
    base = model(tensors, shards=SHARDS)
    b, a = rng.standard_normal((256, 4)).astype(np.float32), rng.standard_normal((4, 128)).astype(np.float32)
    updates = {name: Dora(LowRank(b, a, 0.01), np.full(256, 11, np.float32)) for name in NAMES}
    return base, save(Adapter(updates), tmp_path / "adapter", format="peft")


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def staged(out: Path) -> Path:
    return out.with_name(f".{out.name}.unfinished")


def stop_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``count`` shards be finished, then stop within the next one."""
    from loratools.ops import rewrite as engine

    write, done = engine._write_shard, []

    def limited(*args: Any) -> None:
        if len(done) == count:
            raise KeyboardInterrupt
        write(*args)
        done.append(1)

    monkeypatch.setattr(engine, "_write_shard", limited)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_resume_gives_the_same_bytes_and_the_same_report(
    count: int, job: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = job
    undo = tmp_path / "undo.safetensors"
    whole = merge(base, [load(adapter)], tmp_path / "whole", rounding="stochastic", undo_file=undo)
    with monkeypatch.context() as patched:
        stop_after(count, patched)
        with pytest.raises(KeyboardInterrupt):
            merge(base, [load(adapter)], tmp_path / "out", rounding="stochastic", undo_file=tmp_path / "u2")
    assert not (tmp_path / "out").exists()
    assert len(list(staged(tmp_path / "out").glob("*.safetensors"))) == count
    with pytest.raises(ExistsError, match="unfinished job"):
        merge(base, [load(adapter)], tmp_path / "out", rounding="stochastic", undo_file=tmp_path / "u2")
    with pytest.raises(MismatchError, match="another one") as caught:
        merge(base, [load(adapter)], tmp_path / "out", weights=[0.5], undo_file=tmp_path / "u2", resume=True)
    assert "rounding" in str(caught.value.got)
    assert "weights" in str(caught.value.got)
    rest = merge(base, [load(adapter)], tmp_path / "out", rounding="stochastic", undo_file=tmp_path / "u2", resume=True)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert (tmp_path / "u2").read_bytes() == undo.read_bytes()
    assert rest.to_dict() == whole.to_dict()
    assert not staged(tmp_path / "out").exists()


def test_resume_without_an_unfinished_job_starts_one(job: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = job
    merge(base, [load(adapter)], tmp_path / "out", resume=True)
    assert (tmp_path / "out").is_dir()


def test_overwrite_starts_afresh(job: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = job
    with monkeypatch.context() as patched:
        stop_after(1, patched)
        with pytest.raises(KeyboardInterrupt):
            merge(base, [load(adapter)], tmp_path / "out")
    merge(base, [load(adapter)], tmp_path / "out", weights=[0.5], overwrite=True)
    assert not staged(tmp_path / "out").exists()


@pytest.mark.parametrize("after", [0.0, 0.2, 0.4, 0.7])
def test_kill_9_at_random_points(after: float, job: tuple[Path, Path], tmp_path: Path) -> None:
    """Kill -9 a slowed merge after some of its blocks; then resume, again and again until it is through."""
    base, adapter = job
    merge(base, [load(adapter)], tmp_path / "whole")
    script = f"""
import time
from loratools.files import load
from loratools.io import save_like
from loratools.ops import rewrite
from loratools.ops.merge import merge
write = rewrite.write_array
def slow(*args):
    time.sleep(0.02)
    write(*args)
rewrite.write_array = slow
print("ready", flush=True)
merge({str(base)!r}, [load({str(adapter)!r})], {str(tmp_path / "out")!r}, resume=True)
"""
    for attempt in range(3):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd="/")
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(after * (attempt + 1) / 2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (tmp_path / "out").exists():
            break
        for shard in staged(tmp_path / "out").glob("*.safetensors"):  # what bears a final name is finished
            assert shard.read_bytes() == (tmp_path / "whole" / shard.name).read_bytes()
    if not (tmp_path / "out").exists():
        merge(base, [load(adapter)], tmp_path / "out", resume=True)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_full_disk_is_told_and_the_job_can_go_on(
    job: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = job
    merge(base, [load(adapter)], tmp_path / "whole")
    pwrite, written = os.pwrite, [0]

    def full(fd: int, data: Any, offset: int) -> int:
        written[0] += len(data)
        if written[0] > 3 * 256 * 128 * 2 * 2:
            raise OSError(28, "No space left on device")
        return pwrite(fd, data, offset)

    with monkeypatch.context() as patched:
        patched.setattr(io_output.os, "pwrite", full)
        with pytest.raises(FileError, match="cannot write") as caught:
            merge(base, [load(adapter)], tmp_path / "out")
    assert "--resume" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()
    merge(base, [load(adapter)], tmp_path / "out", resume=True)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_too_little_space_is_told_before_any_work(
    job: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = job

    class Disk:
        f_bavail, f_frsize, f_blocks = 1, 4096, 10

    monkeypatch.setattr(os, "statvfs", lambda path: Disk)
    with pytest.raises(FileError, match="not enough free space"):
        merge(base, [load(adapter)], tmp_path / "out")
    assert not staged(tmp_path / "out").exists()


def test_a_changed_base_is_another_job(job: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = job
    with monkeypatch.context() as patched:
        stop_after(1, patched)
        with pytest.raises(KeyboardInterrupt):
            merge(base, [load(adapter)], tmp_path / "out")
    shard = next(base.glob("*.safetensors"))
    from safetensors.numpy import load_file

    save_file({n: t + 1 for n, t in load_file(shard).items()}, shard, metadata={"format": "pt"})
    with pytest.raises(MismatchError, match="another one"):
        merge(base, [load(adapter)], tmp_path / "out", resume=True)
