"""Parametrisations that become plain factors: right against PEFT or the papers' formulas, written back unchanged."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import loratools as lt
from loratools.errors import FormatError, MismatchError, UnsupportedError
from loratools.linalg.namespace import to_numpy

Arrays = dict[str, np.ndarray[Any, Any]]
PREFIX = "base_model.model."
EPS = np.finfo(np.float32).eps


def random(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed + sum(shape)).standard_normal(shape).astype(np.float32)


def config(**said: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q"], **said}


def pair(path: str = "q", a: tuple[int, int] = (4, 12), b: tuple[int, ...] = (10, 4)) -> Arrays:
    return {f"{PREFIX}{path}.lora_A.weight": random(*a), f"{PREFIX}{path}.lora_B.weight": random(*b, seed=1)}


def dense(adapter: lt.Adapter, name: str = "q.weight") -> np.ndarray[Any, Any]:
    return to_numpy(adapter[name].dense())  # type: ignore[attr-defined]


def close(got: Any, expected: Any) -> bool:
    """True within a few fp32 roundings of sums of at most 16 terms."""
    return bool(np.abs(got - expected).max() <= 64 * EPS * np.abs(expected).max())


def written(adapter: lt.Adapter, folder: Path) -> tuple[Arrays, dict[str, Any]]:
    out = lt.save(adapter, folder / "out", format="peft", overwrite=True)
    return load_file(out / "adapter_model.safetensors"), json.loads((out / "adapter_config.json").read_text())


def test_kasa_means_what_peft_says_and_forgets_nothing(
    make: Callable[..., Any], reload: Callable[..., Any], tmp_path: Path
) -> None:
    from peft.tuners.lora.config import KasaConfig

    made = make("llama", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], kasa_config=KasaConfig())
    expected = made.logits(made.model)
    truncated = {
        n.replace(".base_layer.", "."): t.numpy().copy() for n, t in made.model.get_base_model().state_dict().items()
    }
    adapter = lt.load(made.folder)
    assert any("altered base" in remark for remark in adapter.meta.remarks)
    for name, w in made.merged().items():
        ours = adapter[name].apply(truncated[name]) if name in adapter else truncated[name]
        assert np.abs(ours - w).max() <= 2e-6, name  # a few fp32 roundings
    out = lt.save(adapter, tmp_path / "same")
    assert (out / "adapter_model.safetensors").read_bytes() == (made.folder / "adapter_model.safetensors").read_bytes()
    assert (made.logits(reload(made, out)) - expected).abs().max() <= 1e-5 * max(expected.abs().max(), 1)
    squeezed = lt.load(lt.save(lt.squeeze(adapter, rank=2), tmp_path / "squeezed"))
    assert squeezed.meta.config["kasa_config"] is None
    assert any("KaSA (kasa_config) changed the base" in remark for remark in squeezed.meta.remarks)


@pytest.mark.parametrize("spelling", ["q_lora_latent_mapping.weight", "q.default_lora_latent_mapping.weight"])
def test_the_core_of_lora_xs_is_absorbed_and_written_back(spelling: str, tmp_path: Path) -> None:
    core = random(4, 4, seed=2)
    tensors = pair() | {PREFIX + spelling: core}
    adapter = lt.from_state_dict(tensors, config())
    a, b = pair().values()
    assert close(dense(adapter), 1.5 * b @ core @ a)
    again, said = written(adapter, tmp_path)
    assert said == config()
    assert {k: t.tobytes() for k, t in again.items()} == {k: t.tobytes() for k, t in tensors.items()}
    plain, said = written(lt.squeeze(adapter, rank=4), tmp_path)
    assert set(plain) == set(pair())
    assert close(dense(lt.from_state_dict(plain, said)), 1.5 * b @ core @ a)


def test_a_core_without_its_factors_is_refused() -> None:
    with pytest.raises(FormatError, match="core of LoRA-XS"):
        lt.from_state_dict(pair("k") | {PREFIX + "q_lora_latent_mapping.weight": random(4, 4)}, config())
    with pytest.raises(FormatError, match="core of LoRA-XS does not fit"):
        lt.from_state_dict(pair() | {PREFIX + "q_lora_latent_mapping.weight": random(3, 3)}, config())


def test_qalora_repeats_the_columns_of_a_where_the_base_is_wider(tmp_path: Path) -> None:
    said = config(use_qalora=True, qalora_group_size=3, target_modules=["q", "k"])
    tensors = pair() | pair("k", a=(4, 36))
    base = {"q.weight": random(10, 36), "k.weight": random(10, 36)}
    adapter = lt.from_state_dict(tensors, said, base=base)
    (a, b), x = pair().values(), random(36, 5)
    pooled = x.reshape(12, 3, 5).mean(axis=1) * 12  # PEFT: the mean of each group, times the number of groups
    assert close(dense(adapter) @ x, 1.5 * b @ (a @ pooled))
    assert adapter["k.weight"].shape == (10, 36)
    assert not adapter.meta.unmergeable
    assert written(adapter, tmp_path)[1] == said
    plain, fresh = written(lt.squeeze(adapter, rank=2), tmp_path)
    assert fresh["use_qalora"] is False
    assert plain[PREFIX + "q.lora_A.weight"].shape == (2, 36)
    with pytest.raises(MismatchError, match="groups do not fit"):
        lt.from_state_dict(tensors, said | {"qalora_group_size": 5}, base=base)


def test_qalora_without_a_base_is_compressed_as_it_is(tmp_path: Path) -> None:
    said = config(use_qalora=True, qalora_group_size=3)
    adapter = lt.from_state_dict(pair(), said)
    assert set(adapter.meta.unmergeable) == {"q.weight"}
    plain, fresh = written(lt.squeeze(adapter, rank=2), tmp_path)
    assert fresh["use_qalora"] is True
    assert plain[PREFIX + "q.lora_A.weight"].shape == (2, 12)


MERGED = Path(os.environ.get("LORATOOLS_REAL_ADAPTERS", "")) / "bloom560m-mergedlinear-bin"


@pytest.mark.skipif(not MERGED.is_dir(), reason="LORATOOLS_REAL_ADAPTERS is not set")
def test_a_real_merged_linear_file(tmp_path: Path) -> None:
    import torch

    stored = torch.load(MERGED / "adapter_model.bin", weights_only=True, map_location="cpu")
    adapter = lt.load(MERGED)
    assert len(adapter) == 24
    name = next(iter(adapter))
    key = next(k for k in stored if k.endswith("lora_B.weight"))
    b = stored[key].numpy()[:, :, 0]
    a = stored[key.replace("lora_B", "lora_A")].numpy()
    rows = np.concatenate([b[:1024] @ a[:8], np.zeros((1024, 1024)), b[1024:] @ a[8:]])
    assert close(dense(adapter, name).T, 2.0 * rows)  # the config says (in, out)
    again, said = written(adapter, tmp_path)
    assert said == dict(adapter.meta.config)
    assert {k: t.tobytes() for k, t in again.items()} == {k: t.numpy().tobytes() for k, t in stored.items()}
    native = lt.load(lt.save(adapter, tmp_path / "native.safetensors", format="native"))
    assert written(native, tmp_path)[0].keys() == stored.keys()
    plain, said = written(lt.squeeze(adapter, rank=16), tmp_path)
    assert "enable_lora" not in said
    assert close(dense(lt.from_state_dict(plain, said), name), dense(adapter, name))


def test_grouped_factors_need_enable_lora() -> None:
    tensors = pair(a=(8, 12), b=(20, 4, 1))
    assert lt.from_state_dict(tensors, config(enable_lora=[True, False, True]))["q.weight"].shape == (30, 12)
    with pytest.raises(UnsupportedError, match="no enable_lora"):
        lt.from_state_dict(tensors, config())
    with pytest.raises(FormatError, match="do not fit enable_lora"):
        lt.from_state_dict(tensors, config(enable_lora=[True, True, True]))


def test_an_adapter_for_which_only_some_modules_changed_is_written_plainly(tmp_path: Path) -> None:
    """The blocks of BD-LoRA are said for all modules at once, or for none."""
    said = config(use_bdlora={"target_modules_bd_a": [], "target_modules_bd_b": ["q", "k"], "nblocks": 2})
    tensors = pair(b=(10, 2)) | pair("k", b=(10, 2))
    adapter = lt.from_state_dict(tensors, said)
    part = replace(adapter, updates={**adapter.updates, "k.weight": lt.squeeze(adapter, rank=2)["k.weight"]})
    plain, fresh = written(part, tmp_path)
    assert fresh["use_bdlora"] is None
    assert close(dense(lt.from_state_dict(plain, fresh)), dense(adapter))


def test_a_double_parametrisation_of_bd_lora_is_refused() -> None:
    both = {"target_modules_bd_a": ["q"], "target_modules_bd_b": ["q"], "nblocks": 2}
    with pytest.raises(FormatError, match="names both factors"):
        lt.from_state_dict(pair(), config(use_bdlora=both))
    with pytest.raises(FormatError, match="nblocks does not divide"):
        lt.from_state_dict(pair(b=(10, 1)), config(use_bdlora=both | {"target_modules_bd_a": [], "nblocks": 4}))


def test_the_sampler_of_monteclora_goes_with_the_ranks(
    make: Callable[..., Any], reload: Callable[..., Any], tmp_path: Path
) -> None:
    from peft.tuners.lora.config import MontecloraConfig

    made = make("llama", r=4, lora_alpha=8, target_modules=["q_proj"], monteclora_config=MontecloraConfig())
    adapter = lt.load(made.folder)
    assert any("sampler" in remark for remark in adapter.meta.remarks)
    out = lt.save(lt.squeeze(adapter, rank=2), tmp_path / "out")
    reload(made, out)
    tensors = load_file(out / "adapter_model.safetensors")
    said = json.loads((out / "adapter_config.json").read_text())
    assert not any("sampler" in key for key in tensors)
    assert said["monteclora_config"] is None
