"""mlx-lm, run on a tiny Llama: the verdict equals what load_adapters does, and after --fix the output is PEFT's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratools as lt
from loratools.consumers.subject import read
from loratools.io.base import Base
from loratools.ops.check import check, judged
from loratools.ops.fix import fix

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

CLOSE = 2e-4  # fp32 logits of two layers in two libraries that sum in different orders
IDS = np.arange(1, 13).reshape(2, 6)


def loaded(llama: Any, folder: Path | None) -> np.ndarray[Any, Any]:
    """Return the logits of mlx-lm's Llama with the adapter of ``folder``."""
    from mlx_lm.models.llama import Model, ModelArgs
    from mlx_lm.tuner.utils import load_adapters

    said = {k: v for k, v in json.loads((llama.base / "config.json").read_text()).items() if k != "rope_parameters"}
    model = Model(ModelArgs.from_dict({**said, "rope_theta": 10000.0, "rope_scaling": None}))
    weights = {name: mx.array(tensor.numpy()) for name, tensor in llama.weights.items()}
    model.load_weights(list(model.sanitize(weights).items()))
    model.eval()
    if folder is not None:
        load_adapters(model, str(folder))
    return np.array(model(mx.array(IDS)))


@pytest.fixture
def mlx(llama: Any, tmp_path: Path) -> tuple[Path, np.ndarray[Any, Any]]:
    """An MLX adapter made from a PEFT one by the writer alone, and PEFT's output."""
    reference = llama.adapter(tmp_path / "peft").numpy()
    return lt.save(lt.load(tmp_path / "peft"), tmp_path / "mlx", format="mlx"), reference


def changed(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({k: v for k, v in {**json.loads(path.read_text()), **fields}.items() if v is not None}))


def parameters(folder: Path, **fields: Any) -> None:
    said = json.loads((folder / "adapter_config.json").read_text())["lora_parameters"]
    changed(folder, lora_parameters={k: v for k, v in {**said, **fields}.items() if v is not None})


def bad(folder: Path, llama: Any) -> set[str]:
    found = judged(read(folder, base=Base.open(llama.base)), "mlx")
    return {f.id.partition("/")[2] for f in found if f.level == "error"}


def test_a_right_file(mlx: Any, llama: Any) -> None:
    folder, reference = mlx
    assert bad(folder, llama) == set()
    assert np.allclose(loaded(llama, None), llama.untouched.numpy(), atol=CLOSE)
    assert np.allclose(loaded(llama, folder), reference, atol=CLOSE)


FAULTS: dict[str, tuple[str, Any]] = {
    "rank": ("rank-mismatch", lambda f: parameters(f, rank=8)),
    "no scale": ("config", lambda f: parameters(f, scale=None)),
    "no layers": ("config", lambda f: changed(f, num_layers=None)),
    "few layers": ("not-made", lambda f: changed(f, num_layers=1)),
    "few keys": ("not-made", lambda f: parameters(f, keys=["self_attn.q_proj"])),
    "no config": ("config", lambda f: (f / "adapter_config.json").unlink()),
    "file name": ("file-name", lambda f: (f / "adapters.safetensors").rename(f / "0000100_adapters.safetensors")),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_do_not_load_and_fix_mends_them(name: str, mlx: Any, llama: Any, tmp_path: Path) -> None:
    folder, reference = mlx
    rule, plant = FAULTS[name]
    plant(folder)
    assert rule in bad(folder, llama)
    with pytest.raises((ValueError, KeyError, AttributeError, FileNotFoundError, RuntimeError)):
        loaded(llama, folder)
    if name in ("no scale", "no config"):
        with pytest.raises(lt.LoratoolsError):  # nothing in the file says the scale
            fix(read(folder), "mlx", tmp_path / "fixed")
        return
    fix(read(folder, base=Base.open(llama.base)), "mlx", tmp_path / "fixed")
    assert np.allclose(loaded(llama, tmp_path / "fixed"), reference, atol=CLOSE)
    assert check(tmp_path / "fixed", "mlx", base=llama.base).checks[0]["ok"]


def test_strange_names_do_not_load(mlx: Any, llama: Any) -> None:
    from safetensors.numpy import load_file, save_file

    folder, _ = mlx
    path = folder / "adapters.safetensors"
    save_file({k.replace("layers.1", "layers.5"): t for k, t in load_file(path).items()}, path)
    assert bad(folder, llama) & {"missing-modules", "prefix-drift"}
    with pytest.raises(ValueError, match="not an adapter parameter"):
        loaded(llama, folder)


@pytest.mark.parametrize(
    "options",
    [{"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}}, {"use_dora": True}],
)
def test_peft_files_become_mlx_files(options: Any, llama: Any, tmp_path: Path) -> None:
    reference = llama.adapter(tmp_path / "a", **options).numpy()
    assert bad(tmp_path / "a", llama) == {"format"}
    with pytest.raises((AttributeError, KeyError, FileNotFoundError, RuntimeError)):
        loaded(llama, tmp_path / "a")
    fix(read(tmp_path / "a"), "mlx", tmp_path / "b")
    assert bad(tmp_path / "b", llama) == set()
    assert np.allclose(loaded(llama, tmp_path / "b"), reference, atol=CLOSE)
