"""Every type goes through every verb: squeezed, converted, merged, fused or diagnosed it is the update it made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratools as lt
from loratools.formats.peft.refused import REASONS
from loratools.formats.peft.types import PEFT_TYPES
from loratools.io.base import Base
from loratools.kinds.lowrank import LowRank
from loratools.ops.info import info

LAYERS = ("down", "up", "square")
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "ADALORA": ("AdaLoraConfig", {"init_r": 4, "lora_alpha": 8, "total_step": 10}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 4}),
    "C3A": ("C3AConfig", {"block_size": 6}),
    "DEFT": ("DeftConfig", {"r": 3}),
    "DELORA": ("DeloraConfig", {"r": 3}),
    "FOURIERFT": ("FourierFTConfig", {"n_frequency": 40}),
    "FROD": ("FrodConfig", {"sparse_rate": 0.1}),
    "GLORA": ("GloraConfig", {"r": 2}),
    "GRALORA": ("GraloraConfig", {"r": 6, "gralora_k": 3}),
    "HIRA": ("HiraConfig", {"r": 3}),
    "HRA": ("HRAConfig", {"r": 4}),
    "IA3": ("IA3Config", {"feedforward_modules": ["up"]}),
    "LOHA": ("LoHaConfig", {"r": 3}),
    "LOKR": ("LoKrConfig", {"r": 64}),
    "LORA": ("LoraConfig", {"r": 3}),
    "MISS": ("MissConfig", {"r": 4, "init_weights": "bat"}),
    "OFT": ("OFTConfig", {"oft_block_size": 4}),
    "OSF": ("OSFConfig", {"effective_rank": 16}),
    "PEANUT": ("PeanutConfig", {"r": 3, "depth": 1}),
    "PSOFT": ("PsoftConfig", {"r": 4}),
    "PVERA": ("PveraConfig", {"r": 5}),
    "RANDLORA": ("RandLoraConfig", {"r": 5}),
    "ROAD": ("RoadConfig", {"variant": "road_4", "group_size": 4}),
    "SUPERTUNING": ("SupertuningConfig", {"sparsity": 0.9}),
    "SHIRA": ("ShiraConfig", {"r": 2}),
    "TINYLORA": ("TinyLoraConfig", {"r": 3, "u": 5}),
    "UNILORA": ("UniLoraConfig", {"r": 3, "theta_d_length": 50}),
    "VBLORA": ("VBLoRAConfig", {"r": 3, "num_vectors": 20, "vector_length": 4, "topk": 2}),
    "VERA": ("VeraConfig", {"r": 5}),
    "WAVEFT": ("WaveFTConfig", {"n_frequency": 40}),
}
BOUND = {"ADALORA": 4, "DEFT": 3, "DELORA": 3, "HRA": 4, "LORA": 3, "OSF": 16, "PEANUT": 3, "PSOFT": 4, "PVERA": 5,
         "TINYLORA": 3, "UNILORA": 3, "VBLORA": 3, "VERA": 5, "LOHA": 9}  # fmt: skip
"""Types whose updates have a rank bound below 24 here: squeezing at it loses nothing."""
WHOLE = {"BEFT", "LN_TUNING", "TRAINABLE_TOKENS", "BONE"}
"""Types that change no matrix by a rule, or are the older name of another."""

FORKS = {"PACA", "QHFT", "QWHA"}
"""Types of their authors' forks, which PEFT does not have: tests/formats/papers derives them from the papers."""


def test_no_type_is_forgotten() -> None:
    assert set(PEFT_TYPES) - set(REASONS) - WHOLE - FORKS == set(CONFIGS)


@pytest.fixture(scope="module", params=[name for name in CONFIGS if name in PEFT_TYPES])
def made(
    request: pytest.FixtureRequest, oracle_in: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """An adapter of a type, with what PEFT merges of it as ``true``."""
    config, fields = CONFIGS[request.param]
    found = oracle_in(tmp_path_factory.mktemp(request.param), config, LAYERS, **fields)
    found.type = request.param
    found.adapter = found.read()
    found.true = found.changes()
    return found


def _changes(adapter: Any, base: dict[str, Any]) -> dict[str, Any]:
    return {name: u.apply(base[name].astype(np.float64)) - base[name] for name, u in adapter.items()}


def test_squeezed_and_written_it_is_a_lora_that_peft_loads(made: Any, tmp_path: Path) -> None:
    """At full rank the LORA that PEFT loads merges to what the type itself merges to, biases included."""
    import peft

    done = lt.squeeze(made.adapter, rank=24, base=made.base)
    assert all(isinstance(u, LowRank) for name, u in done.items() if name.endswith(".weight"))
    lt.save(done, tmp_path / "lora")
    model = peft.PeftModel.from_pretrained(made.plain(), tmp_path / "lora")
    merged = model.merge_and_unload().state_dict()
    for name, w in made.base.items():
        d = made.true.get(name, np.zeros(1))
        bound = 2e-6 * max(np.abs(d).max(), np.abs(w).max())  # fp32 factors, and W' rounded twice
        assert np.abs(merged[name].double().numpy() - w - d).max() <= bound, name


@pytest.mark.parametrize("rank", [2, 5])
def test_squeezing_is_as_good_as_the_best_of_that_rank(made: Any, rank: int) -> None:
    done = lt.squeeze(made.adapter, rank=rank, base=made.base)
    told = _changes(done, made.base)
    assert done.report is not None
    rows = {row["name"]: row for row in done.report.modules}
    for name, d in made.true.items():
        if d.ndim == 1:
            assert np.abs(told[name] - d).max() <= 1e-6 * np.abs(d).max()
            continue
        s = np.linalg.svd(d, compute_uv=False)
        best, lost = np.sqrt((s[rank:] ** 2).sum()), np.linalg.norm(told[name] - d)
        assert lost <= 1.01 * best + 1e-5 * np.linalg.norm(d), name
        assert rows[name]["relative_error"] == pytest.approx(lost / np.linalg.norm(d), rel=1e-2, abs=1e-5)
        assert rows[name]["energy"] == pytest.approx(1 - lost**2 / (s**2).sum(), abs=1e-4)
        assert rows[name]["rank_after"] <= rank


def test_squeezed_at_the_bound_nothing_is_lost(made: Any) -> None:
    if made.type not in BOUND:
        return
    done = lt.squeeze(made.adapter, rank=BOUND[made.type], base=made.base)
    for name, d in _changes(done, made.base).items():
        assert np.abs(d - made.true[name]).max() <= 2e-6 * max(np.abs(d).max(), np.abs(made.base[name]).max() / 8), name


def test_targets_of_energy_see_the_whole_spectrum(made: Any) -> None:
    done = lt.squeeze(made.adapter, energy=0.9, base=made.base)
    for name, u in done.items():
        if isinstance(u, LowRank):
            s = np.linalg.svd(made.true[name], compute_uv=False)
            share = np.cumsum(s**2) / (s**2).sum()
            assert abs(u.rank - (1 + int((share < 0.9).sum()))) <= (np.abs(share - 0.9).min() < 1e-4)


def test_converted_to_peft_it_is_plain_lora(made: Any) -> None:
    done = lt.convert(made.adapter, "peft", base=made.base, lossy=True)
    kept = {"SHIRA": "sparse"}.get(made.type, "lowrank")
    assert done.report is not None
    for row in done.report.modules:
        assert row["kind_after"] == (kept if row["name"].endswith(".weight") else "dense")
        assert row["relative_error"] <= 0.0101  # the lossy route's own bound
    lossless = lt.convert(made.adapter, "peft", base=made.base) if made.type in BOUND else done
    told = _changes(lossless, made.base)
    for name, d in made.true.items():
        assert np.linalg.norm(told[name] - d) <= (2e-6 if made.type in BOUND else 0.0101) * np.linalg.norm(d) + 1e-6


def test_made_lora_it_is_exact_at_the_bound_and_the_nearest_below(made: Any) -> None:
    done = lt.convert(made.adapter, "peft", type="lora", rank=None if made.type in BOUND else 24, base=made.base)
    for name, d in _changes(done, made.base).items():
        true = made.true[name]
        assert np.linalg.norm(d - true) <= 5e-6 * np.linalg.norm(true) + 1e-6, name
        assert done[name].kind == ("lowrank" if d.ndim > 1 else "dense")


def test_merged_it_is_what_peft_merges(made: Any) -> None:
    from loratools.ops.merge import merged

    for name, w in merged(made.base, [made.adapter]):
        d = made.true.get(name, np.zeros(1))
        bound = 5e-7 * max(np.abs(d).max(), np.abs(w).max())  # one rounding of W' on each side
        assert np.abs(w.astype(np.float64) - made.base[name] - d).max() <= bound, name


def test_diagnosed_it_has_the_spectrum_of_its_change(made: Any) -> None:
    report = lt.diagnose(made.adapter, base=made.base, k=3)
    for row in report.modules:
        d = made.true[row["name"]]
        if d.ndim > 1:
            assert row["update_norm"] == pytest.approx(np.linalg.norm(d), rel=1e-4)
            if made.adapter[row["name"]].kind != "dora":
                assert row["spectral_norm"] == pytest.approx(np.linalg.norm(d, 2), rel=1e-3)


def test_fused_with_itself_it_is_itself(made: Any) -> None:
    done = lt.fuse([made.adapter, made.adapter], weights=[0.5, 0.5], method="linear", base=made.base)
    for name, d in _changes(done, made.base).items():
        assert np.abs(d - made.true[name]).max() <= 2e-6 * max(np.abs(d).max(), np.abs(made.base[name]).max()), name


def test_info_tells_what_it_is(made: Any) -> None:
    report = info(made.adapter)
    rows = {row["name"]: row for row in report.modules}
    assert set(rows) == set(made.adapter)
    assert not any("duplicated" in warning and ".bias" in warning for warning in report.warnings)
    assert all(row["bytes"] > 0 for row in rows.values())


def test_it_survives_the_native_format(made: Any, tmp_path: Path) -> None:
    lt.save(made.adapter, tmp_path / "native.safetensors", format="native")
    back = lt.load(tmp_path / "native.safetensors", base=Base.open(made.base))
    for name, d in _changes(made.adapter, made.base).items():
        again = _changes(back, made.base)[name]
        assert np.abs(again - d).max() <= 1e-14 * max(np.abs(d).max(), 1.0), name  # strides change the order of sums


@pytest.mark.parametrize(
    ("config", "fields", "layers"),
    [
        ("HiraConfig", {"r": 3}, ("conv", "point", "embedding")),
        ("HiraConfig", {"r": 3}, ("turned",)),
        ("OFTConfig", {"oft_block_size": 4}, ("conv", "embedding")),
        ("IA3Config", {"feedforward_modules": []}, ("turned", "conv")),
    ],
)
def test_other_layers_become_a_lora_that_peft_loads(
    config: str, fields: dict[str, Any], layers: tuple[str, ...], oracle_in: Callable[..., Any], tmp_path: Path
) -> None:
    import peft

    made = oracle_in(tmp_path / "own", config, layers, **fields)
    true = made.changes()
    lt.save(lt.squeeze(made.read(), rank=36, base=made.base), tmp_path / "lora", format="peft")
    merged = peft.PeftModel.from_pretrained(made.plain(), tmp_path / "lora").merge_and_unload().state_dict()
    for name, w in made.base.items():
        d = true.get(name, np.zeros(1))
        bound = 2e-6 * max(np.abs(d).max(), np.abs(w).max())
        assert np.abs(merged[name].double().numpy() - w - d).max() <= bound, name
