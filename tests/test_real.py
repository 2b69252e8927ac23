"""Every real adapter: PEFT ones go through info and squeeze; every other file gets a precise refusal."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import loratools as lt
from loratools.cli import main as cli
from loratools.errors import FormatError, NeedsBaseError
from loratools.kinds.lowrank import LowRank
from loratools.linalg.namespace import to_numpy, up

pytestmark = pytest.mark.real
HERE = os.environ.get("LORATOOLS_REAL_ADAPTERS")
FOLDERS = sorted(p for p in Path(HERE).iterdir() if p.is_dir()) if HERE else []
PEFT = [p for p in FOLDERS if p.name.startswith(("roberta-agnews", "roberta-pt", "convnext"))]
UNREADABLE = {
    "smolvla-no-weights-bin": "scalars without any LoRA matrix",
    "t0-3b-ia3-pt": "a single vector does not tell the shape of the weight",
}


def test_the_real_adapters_are_named(real: Path) -> None:
    assert FOLDERS


@pytest.mark.parametrize("folder", PEFT, ids=lambda p: p.name)
def test_peft_adapters_squeeze_to_the_dense_optimum(folder: Path, tmp_path: Path) -> None:
    adapter = lt.load(folder)
    squeezed = lt.squeeze(adapter, rank=2)
    assert lt.load(lt.save(squeezed, tmp_path / "out")).keys() == adapter.keys()
    for name in [n for n, u in adapter.items() if isinstance(u, LowRank)][::7]:
        u, v = adapter[name], squeezed[name]
        d = u.scale * to_numpy(up(u.b, "float64")) @ to_numpy(up(u.a, "float64"))
        s = np.linalg.svd(d, compute_uv=False)
        error = np.linalg.norm(d - to_numpy(up(v.b, "float64")) @ to_numpy(up(v.a, "float64")))
        assert error - np.sqrt((s[2:] ** 2).sum()) <= 1e-6 * np.linalg.norm(d)


@pytest.mark.parametrize("folder", PEFT, ids=lambda p: p.name)
def test_peft_adapters_come_back_tensor_for_tensor(folder: Path, tmp_path: Path) -> None:
    out = lt.save(lt.load(folder), tmp_path / "out")
    before, after = (lt.load(d) for d in (folder, out))
    assert (out / "adapter_model.safetensors").stat().st_size
    from safetensors.numpy import load_file

    x, y = load_file(folder / "adapter_model.safetensors"), load_file(out / "adapter_model.safetensors")
    assert x.keys() == y.keys()
    assert all(np.array_equal(x[k], y[k]) for k in x)
    assert before.meta.config == after.meta.config


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_every_adapter_is_read_or_refused_in_words(folder: Path) -> None:
    runner = CliRunner()
    result = runner.invoke(cli.main, ["info", str(folder), "--json"])
    if isinstance(result.exception, FormatError | NeedsBaseError):
        assert str(folder) in str(result.exception)
        assert UNREADABLE.get(folder.name, "") in str(result.exception)
    else:
        assert result.exit_code == 0, result.exception
        assert folder.name not in UNREADABLE
