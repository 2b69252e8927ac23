"""switch: exact, undone bit for bit, one step even when killed; another base is refused before writing."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import loratools as lt
from loratools.core.adapter import Adapter, Meta
from loratools.errors import FileError, LoratoolsError, MismatchError, UnsupportedError, UsageError
from loratools.kinds.lowrank import LowRank
from loratools.kinds.sparse import of_entries
from loratools.ops.switch_state import JOURNAL, State

SHAPES = {"x.a.weight": (40, 30), "x.b.weight": (20, 50), "x.norm.weight": (30,)}


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(s).astype(np.float16) for n, s in SHAPES.items()}


def model(folder: Path, seed: int = 0) -> Path:
    folder.mkdir()
    save_file(weights(seed), folder / "model.safetensors")
    return folder


def sparse(seed: int, share: float = 0.1, names: tuple[str, ...] = ("x.a.weight", "x.b.weight")) -> Adapter:
    rng = np.random.default_rng(seed)
    updates = {}
    for name in names:
        size = int(np.prod(SHAPES[name]))
        flat = np.sort(rng.permutation(size)[: int(share * size)]).astype(np.int64)
        updates[name] = of_entries(flat, rng.standard_normal(len(flat)).astype(np.float32), SHAPES[name])
    return Adapter(updates, Meta(format="native", namespace="hf"))


def saved(adapter: Adapter, path: Path) -> Path:
    return lt.save(adapter, path, format="native")


def content(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def held(folder: Path) -> dict[str, np.ndarray]:
    from loratools.io.base import Base

    opened = Base.open(folder)
    return {n: opened[n] for n in opened}


def test_on_is_the_merged_model_and_off_the_old_bytes(tmp_path: Path) -> None:
    folder, a = model(tmp_path / "m"), sparse(1)
    before = content(folder)
    report = lt.switch(folder, on=[a])
    for name, w in weights().items():
        assert np.array_equal(held(folder)[name], a[name].apply(w) if name in a else w)
    assert report.total["entries"] == sum(u.nnz for u in a.values())
    lt.switch(folder, off=[a])
    assert content(folder) == before
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors"]


def test_the_order_does_not_matter_and_overlaps_are_undone(tmp_path: Path) -> None:
    one, two = model(tmp_path / "one"), model(tmp_path / "two")
    before, a, b = content(one), sparse(1, 0.5), sparse(2, 0.5)
    lt.switch(one, on=[a])
    report = lt.switch(one, on=[b])
    assert report.total["overlap"] > 0
    lt.switch(two, on=[b])
    lt.switch(two, on=[a])
    assert content(one) == content(two)
    lt.switch(one, off=[a])
    lt.switch(two, off=[a])
    alone = model(tmp_path / "alone")
    lt.switch(alone, on=[b])
    assert content(one) == content(two) == content(alone)
    lt.switch(one, off=[b])
    assert content(one) == before


def test_swapping_in_one_step(tmp_path: Path) -> None:
    folder, alone, a, b = model(tmp_path / "m"), model(tmp_path / "alone"), sparse(1), sparse(2)
    lt.switch(folder, on=[a])
    lt.switch(folder, on=[b], off=[a])
    lt.switch(alone, on=[b])
    assert content(folder) == content(alone)


def test_disjoint_adapters_commute_bit_for_bit(tmp_path: Path) -> None:
    a, b = sparse(1, names=("x.a.weight",)), sparse(2, names=("x.b.weight",))
    one, two = model(tmp_path / "one"), model(tmp_path / "two")
    lt.switch(one, on=[a, b])
    lt.switch(two, on=[b])
    lt.switch(two, on=[a])
    assert content(one) == content(two)


def test_files_of_peft_and_of_bfloat16(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    bf16 = {n: w.astype(ml_dtypes.bfloat16) for n, w in weights().items()}
    save_file(bf16, folder / "model.safetensors")
    before = content(folder)
    source = Adapter(
        {n: LowRank(np.ones((SHAPES[n][0], 2), np.float32), np.ones((2, SHAPES[n][1]), np.float32))
         for n in ("x.a.weight", "x.b.weight")},
        Meta(format="peft", namespace="hf"),
    )  # fmt: skip
    path = lt.save(lt.shira(source, density=0.2, base=folder), tmp_path / "s", format="peft")
    lt.switch(folder, on=[path])
    assert content(folder) != before
    lt.switch(folder, off=[path])
    assert content(folder) == before


CHILD = """
import os, signal, sys
import loratools as lt
from loratools.io import inplace, write, atomic
from loratools.ops import switch_state
what, after, folder, on, off = sys.argv[1], int(sys.argv[2]), *sys.argv[3:6]
seen = 0
def dying(f):
    def wrapped(*args, **kwargs):
        global seen
        seen += 1
        if seen > after:
            os.kill(os.getpid(), signal.SIGKILL)
        return f(*args, **kwargs)
    return wrapped
owner, name = {"write": (inplace.InPlace, "write"), "flush": (inplace.InPlace, "flush"),
               "begin": (switch_state.State, "begin"), "keep": (switch_state.State, "keep"),
               "finish": (switch_state.State, "finish"), "replace": (os, "replace")}[what]
setattr(owner, name, dying(getattr(owner, name)))
lt.switch(folder, on=[on] if on else [], off=[off] if off else [])
"""


@pytest.mark.parametrize(
    ("what", "after"),
    [("keep", 0), ("begin", 0), ("write", 0), ("write", 1), ("flush", 0), ("finish", 0), ("replace", 0), ("replace", 1),
     ("replace", 2)],
)  # fmt: skip
def test_a_killed_switch_is_completed_or_never_happened(what: str, after: int, tmp_path: Path) -> None:
    folder, done = model(tmp_path / "m"), model(tmp_path / "done")
    a, b = saved(sparse(1, 0.4), tmp_path / "a.safetensors"), saved(sparse(2, 0.4), tmp_path / "b.safetensors")
    pristine = content(folder)
    lt.switch(folder, on=[a])
    before = content(folder)
    lt.switch(done, on=[b])
    child = subprocess.run(
        [sys.executable, "-c", CHILD, what, str(after), str(folder), str(b), str(a)], cwd=tmp_path, check=False,
        capture_output=True,
    )  # fmt: skip
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()[-2000:]
    begun = (State(folder).path / JOURNAL).exists() or (what, after) == ("replace", 2)
    lt.switch(folder)  # the next call cleans up
    assert content(folder) == (content(done) if begun else before)
    assert not (State(folder).path / JOURNAL).exists()
    lt.switch(folder, off=[b] if begun else [a])
    assert content(folder) == pristine


def test_a_changed_model_is_refused_before_writing(tmp_path: Path) -> None:
    folder, a = model(tmp_path / "m"), sparse(1)
    lt.switch(folder, on=[a])
    changed = {n: w.copy() for n, w in held(folder).items()}
    changed["x.a.weight"].reshape(-1)[a["x.a.weight"].flat()[0]] += 1
    save_file(changed, folder / "model.safetensors")
    before = content(folder)
    for options in ({"off": [a]}, {"on": [sparse(2)]}):
        with pytest.raises(MismatchError, match="changed"):
            lt.switch(folder, **options)  # type: ignore[arg-type]
    assert content(folder) == before


@pytest.mark.parametrize("keep", [True, False])
def test_the_wrong_base_is_refused_before_writing(keep: bool, tmp_path: Path) -> None:
    folder, other = model(tmp_path / "m"), model(tmp_path / "other", seed=5)
    source = Adapter(dict(sparse(1, 0.6)), Meta(format="native", namespace="hf"))
    made = lt.shira(source, density=0.1, base=other, keep_base=keep, to="native", dtype="float32")
    path = saved(made, tmp_path / "s.safetensors")
    before = content(folder)
    with pytest.raises(MismatchError, match="not the model"):
        lt.switch(folder, on=[path])
    assert content(folder) == before
    assert not State(folder).path.exists()
    lt.switch(other, on=[path])


def test_what_is_refused(tmp_path: Path) -> None:
    folder, a = model(tmp_path / "m"), sparse(1)
    low = LowRank(np.ones((40, 1), np.float32), np.ones((1, 30), np.float32))
    with pytest.raises(UnsupportedError, match="sparse"):
        lt.switch(folder, on=[Adapter({"x.a.weight": low})])
    with pytest.raises(MismatchError):
        lt.switch(folder, off=[a])
    with pytest.raises(LoratoolsError):
        lt.switch(folder, on=[Adapter({"y.weight": a["x.a.weight"]})])
    with pytest.raises(MismatchError):
        lt.switch(folder, on=[Adapter({"x.b.weight": a["x.a.weight"]})])
    lt.switch(folder, on=[a])
    with pytest.raises(UsageError, match="already"):
        lt.switch(folder, on=[a])
    with pytest.raises(LoratoolsError):
        lt.switch(tmp_path / "nowhere", on=[a])
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(FileError, match="link"):
        lt.switch(linked, on=[sparse(3)])


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    folder, a = model(tmp_path / "m"), sparse(1)
    before = content(folder)
    assert lt.switch(folder, on=[a], dry_run=True).total["entries"] > 0
    assert content(folder) == before
    assert not State(folder).path.exists()


def test_only_pages_of_touched_tensors_are_written(tmp_path: Path) -> None:
    """Bytes outside the entries stay: also those of other tensors and of the header."""
    folder, a = model(tmp_path / "m"), sparse(1, 0.05)
    before = np.frombuffer(content(folder), np.uint8)
    lt.switch(folder, on=[a])
    changed = np.flatnonzero(np.frombuffer(content(folder), np.uint8) != before)
    assert 0 < len(changed) <= 2 * sum(u.nnz for u in a.values())


def library(name: str) -> Any:
    if name == "numpy":
        return lambda x: x
    torch = pytest.importorskip("torch")
    return torch.from_numpy


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_tensors_in_memory(name: str) -> None:
    tensors = {n: library(name)(w.copy()) for n, w in weights().items()}
    board, a, b = lt.Switchboard(tensors), sparse(1, 0.5), sparse(2, 0.5)
    board.put_on(a)
    for n, u in a.items():
        assert np.array_equal(np.asarray(tensors[n]), u.apply(weights()[n]))
    board.put_on(b)
    board.take_off(a)
    for n, u in b.items():
        assert np.array_equal(np.asarray(tensors[n]), u.apply(weights()[n]))
    with pytest.raises(MismatchError):
        board.take_off(a)
    row, column = divmod(int(b["x.a.weight"].flat()[0]), 30)
    kept = float(tensors["x.a.weight"][row, column])
    tensors["x.a.weight"][row, column] = 7
    with pytest.raises(MismatchError, match="changed"):
        board.take_off(b)
    tensors["x.a.weight"][row, column] = kept
    board.take_off(b)
    assert board.on == ()
    assert all(np.array_equal(np.asarray(tensors[n]), w) for n, w in weights().items())


def test_a_view_that_is_not_contiguous_is_refused() -> None:
    tensors = weights() | {"x.a.weight": np.ascontiguousarray(weights()["x.a.weight"].T).T}
    with pytest.raises(UsageError, match="contiguous"):
        lt.Switchboard(tensors).put_on(sparse(1))


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    from loratools.io.inplace import locked

    folder = model(tmp_path / "m")
    state = State(folder)
    with locked(state.path / "lock"), pytest.raises(FileError, match="another switch"):
        lt.switch(folder, on=[sparse(1)])


def test_a_directory_and_its_only_file_are_one_model(tmp_path: Path) -> None:
    folder, a, b = model(tmp_path / "m"), sparse(1), sparse(2)
    before, file = content(folder), folder / "model.safetensors"
    lt.switch(folder, on=[a])
    assert State(folder).path == State(file).path
    with pytest.raises(UsageError, match="already"):
        lt.switch(file, on=[a])
    lt.switch(file, on=[b])
    assert lt.switch(folder).extra["on"] == ["an adapter in memory"] * 2
    lt.switch(file, off=[a, b])
    assert content(folder) == before
    assert not State(folder).path.exists()


def sharded(folder: Path) -> Path:
    folder.mkdir()
    for i, (name, w) in enumerate(weights().items(), 1):
        save_file({name: w}, folder / f"model-{i:05d}-of-00003.safetensors")
    return folder


def test_a_shard_and_its_model_are_not_switched_apart(tmp_path: Path) -> None:
    folder, a = sharded(tmp_path / "m"), sparse(1, names=("x.a.weight",))
    shard = folder / "model-00001-of-00003.safetensors"
    before = shard.read_bytes()
    lt.switch(folder, on=[a])
    with pytest.raises(UsageError, match="with its directory"):
        lt.switch(shard, off=[a])
    lt.switch(folder, off=[a])
    assert shard.read_bytes() == before
    lt.switch(shard, on=[a])
    with pytest.raises(UsageError, match="by itself"):
        lt.switch(folder, on=[sparse(2)])
    lt.switch(shard, off=[a])
    assert shard.read_bytes() == before


def test_a_refused_switch_leaves_no_directory(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    with pytest.raises(MismatchError):
        lt.switch(folder, off=[sparse(1)])
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors"]


def test_what_is_imported(tmp_path: Path) -> None:
    """A native adapter is put on without the other formats: their imports would take longer than small switches."""
    folder, path = model(tmp_path / "m"), saved(sparse(1), tmp_path / "a.safetensors")
    code = "import sys, loratools as lt; lt.switch(sys.argv[1], on=[sys.argv[2]]); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(folder), str(path)], cwd=tmp_path, check=True,
                          capture_output=True, text=True)  # fmt: skip
    loaded = set(done.stdout.split())
    assert "loratools.formats.native" in loaded
    assert not loaded & {"torch", "scipy", "rich", "networkx", "loratools.formats.peft", "loratools.formats.kohya"}


def test_a_lock_that_was_removed_meanwhile_is_taken_anew(tmp_path: Path) -> None:
    """Its last owner may remove a lock between its opening and its locking: two processes must never hold one."""
    import fcntl

    from loratools.io import inplace

    path = tmp_path / "state" / "lock"
    real, removed = fcntl.flock, []

    def flock(fd: int, how: int) -> None:
        if not removed:
            removed.append(path.unlink())
            path.parent.rmdir()
        real(fd, how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", flock)
        with inplace.locked(path):
            assert removed
            with pytest.raises(FileError, match="another switch"), inplace.locked(path):
                pass


def test_a_finished_switch_leaves_a_directory_that_another_process_is_in(tmp_path: Path) -> None:
    state = State(model(tmp_path / "m"))
    state.path.mkdir()
    (state.path / "state.json").write_text('{"version": 1, "on": {}}')
    unlink = Path.unlink

    def late(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok=missing_ok)
        if path.name == "lock":  # the next process makes its own at once
            path.touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", late)
        state.tidy()
    assert (state.path / "lock").exists()


@pytest.mark.parametrize("off", [True, False])
def test_a_model_that_was_replaced_is_refused(tmp_path: Path, off: bool) -> None:
    folder, a = model(tmp_path / "m"), sparse(1)
    lt.switch(folder, on=[a])
    (file,) = folder.glob("*.safetensors")
    for tensors in ({"other.weight": np.zeros((3, 3), np.float32)}, {n: w[:1].copy() for n, w in weights().items()}):
        save_file(tensors, file)
        with pytest.raises(MismatchError, match="replaced"):
            lt.switch(folder, off=[a] if off else [])


def test_dry_runs_refuse_what_real_ones_do(tmp_path: Path) -> None:
    folder, a = model(tmp_path / "m"), sparse(1)
    for dry_run in (True, False):
        with pytest.raises(UsageError, match="on already"):
            lt.switch(folder, on=[a, a], dry_run=dry_run)


def test_a_read_only_array_is_refused_before_anything_is_written() -> None:
    tensors = weights()
    last = list(sparse(1))[-1]
    tensors[last].flags.writeable = False
    before = {n: w.copy() for n, w in tensors.items()}
    with pytest.raises(UsageError, match="read-only"):
        lt.Switchboard(tensors).put_on(sparse(1))
    assert all(np.array_equal(before[n], w) for n, w in tensors.items())
