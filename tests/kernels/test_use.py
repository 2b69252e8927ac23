"""What users call takes the kernels by itself where tensors are on a GPU: the same results as without them."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools as lt
from loratools import dispatch
from loratools.cli import _session
from loratools.cli import main as cli
from loratools.core import adapter as core
from loratools.core.adapter import Adapter
from loratools.core.update import tensors
from loratools.kernels import row_norms_many
from loratools.kinds.dora import Dora
from loratools.kinds.lowrank import LowRank
from loratools.kinds.replace import Replace
from loratools.linalg import namespace
from loratools.ops import fp8, merge_blocks, rewrite
from loratools.ops.fold import fold
from loratools.ops.types.dora import to_dora
from loratools.ops.types.lora import to_lora

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
BF16, FP32 = torch.bfloat16, torch.float32
NAMES = ("layers.0.q_proj.weight", "layers.1.q_proj.weight")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tensors of torch count as being on a GPU (under the interpreter they are not); lists the kernels that ran."""
    ran: list[str] = []
    run = dispatch._run

    def noted(kernel: str, *args: Any) -> Any:
        ran.append(kernel.rpartition(".")[2])
        return run(kernel, *args)

    def has_tensor(args: Any) -> bool:
        return any(isinstance(x, sys.modules["torch"].Tensor) for x in map(dispatch._first, args))

    monkeypatch.setattr(dispatch, "_run", noted)
    monkeypatch.setattr(dispatch, "_has_accelerator", has_tensor)
    return ran


@pytest.fixture
def off(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that calls another one with kernels off."""

    def call(f: Any, *args: Any, **kwargs: Any) -> Any:
        with monkeypatch.context() as within:
            within.setenv("LORATOOLS_KERNELS", "off")
            return f(*args, **kwargs)

    return call


@pytest.fixture
def model(random) -> tuple[Adapter, dict[str, Any]]:
    """Two adapted matrices of different shapes and their base, on the device."""
    shapes = {NAMES[0]: (24, 20), NAMES[1]: (12, 30)}
    updates = {
        name: LowRank(random(m, 4, BF16, 1, 0.3).contiguous(), random(4, n, BF16, 2, 0.3).contiguous(), 0.5)
        for name, (m, n) in shapes.items()
    }
    return Adapter(updates), {name: random(m, n, FP32, 3).contiguous() for name, (m, n) in shapes.items()}


def dora(random, u: LowRank) -> Dora:
    return Dora(u, random(u.shape[0], 1, FP32, 4)[:, 0].abs() * 0.1 + 4)


def test_dora_apply_change_and_gain(random, model, seen, off):
    adapter, base = model
    w, coat = base[NAMES[0]], dora(random, adapter[NAMES[0]])
    assert torch.allclose(coat.gain(w), off(coat.gain, w), rtol=2e-6)
    assert torch.allclose(coat.apply(w), off(coat.apply, w), rtol=1e-5, atol=1e-6)
    change, gain = coat.change(w)
    true, true_gain = off(coat.change, w)
    assert torch.allclose(change, true, rtol=1e-5, atol=1e-5)
    assert torch.allclose(gain, true_gain, rtol=2e-6)
    assert set(seen) == {"fused_row_norms", "fused_compose"}


def test_merging_folds_through_the_kernels(random, model, seen, off):
    adapter, base = model
    w, coat = base[NAMES[0]], dora(random, adapter[NAMES[0]])
    terms = [(0.5, coat), (1.0, adapter[NAMES[0]])]
    assert torch.allclose(fold(w, terms).value, off(fold, w, terms).value, rtol=1e-5, atol=1e-5)
    assert set(seen) == {"fused_row_norms", "fused_compose"}


def test_a_model_on_disk_is_merged_where_the_adapter_is(random, model, seen, off, tmp_path):
    adapter, base = model
    one = Adapter({NAMES[0]: dora(random, adapter[NAMES[0]])})
    save_file({name: w.to(BF16).cpu() for name, w in base.items()}, tmp_path / "model.safetensors")
    lt.merge(tmp_path / "model.safetensors", [one], tmp_path / "on")
    assert {"fused_row_norms", "fused_compose"} == set(seen)
    off(lt.merge, tmp_path / "model.safetensors", [one], tmp_path / "off")
    made, true = (merged(tmp_path / way)[NAMES[0]].float() for way in ("on", "off"))
    assert torch.allclose(made, true, rtol=2**-7)  # at most the last bit of bf16


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """``--device cuda`` is where kernels run: under the interpreter torch's own memory. Counts parameters on it."""
    there: list[int] = []
    if DEVICE == "cpu":
        monkeypatch.setattr(_session, "_device", lambda asked: "cuda" if asked == "cuda" else "cpu")
        monkeypatch.setattr(core, "to_device", lambda x, device: namespace.placed_like(x, torch.ones(1)))
        for module in (merge_blocks, fp8):
            monkeypatch.setattr(module, "is_away", lambda u: isinstance(next(iter(tensors(u)))[1], torch.Tensor))
    held = rewrite._TURN

    class Turn:
        def __enter__(self) -> None:
            held.__enter__()
            there.append(there[-1] + 1 if there else 1)

        def __exit__(self, *raised: Any) -> None:
            there.append(there[-1] - 1)
            held.__exit__(*raised)

    monkeypatch.setattr(rewrite, "_TURN", Turn())
    return there


def merged(folder: Path) -> dict[str, Any]:
    return load_file(next(folder.rglob("*.safetensors")))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_merge_on_a_device_is_the_merge_of_the_cpu_one_parameter_at_a_time(
    random, model, force, monkeypatch, cuda, tmp_path, rounding
):
    adapter, base = model
    mixed = {NAMES[0]: dora(random, adapter[NAMES[0]]), NAMES[1]: adapter[NAMES[1]], "head": Replace(torch.ones(3, 4))}
    lt.save(Adapter(mixed).to("cpu"), tmp_path / "in.safetensors", format="native")
    stored = {name: w.to(BF16).cpu().contiguous() for name, w in base.items()}
    save_file({**stored, "other": torch.ones(5)}, tmp_path / "model.safetensors")
    words = ["merge", tmp_path / "model.safetensors", tmp_path / "in.safetensors", "--rounding", rounding]
    undo = ["--undo", tmp_path / "undo"]
    assert cli._code([*map(str, words), "--device", "cuda", "-o", str(tmp_path / "on"), *map(str, undo)]) == 0
    assert cuda == [1, 0] * 3  # the head as well
    monkeypatch.setenv("LORATOOLS_KERNELS", "off")
    assert cli._code([*map(str, words), "-o", str(tmp_path / "off")]) == 0
    on, true = merged(tmp_path / "on"), merged(tmp_path / "off")
    assert on.keys() == true.keys() == {*NAMES, "other", "head"}
    for name, w in true.items():
        assert on[name].dtype == w.dtype
        assert torch.allclose(on[name].float(), w.float(), rtol=2**-7)
    gain, true_gain = (
        load_file(tmp_path / "undo")[f"{NAMES[0]}\ngain"],
        mixed[NAMES[0]].gain(base[NAMES[0]].to(BF16).float()),
    )
    assert torch.allclose(gain.double(), true_gain.cpu().double(), rtol=3e-6)


def test_a_magnitude_on_columns_and_fp8_codes_are_merged_on_a_device_too(random, model, cuda, monkeypatch, tmp_path):
    adapter, _ = model
    u = adapter[NAMES[0]]
    columns = Dora(u, random(u.shape[1], 1, FP32, 4)[:, 0].abs() + 4, axis=1)
    save_file({NAMES[0]: random(*u.shape, FP32, 3).cpu().contiguous()}, tmp_path / "model.safetensors")
    lt.save(Adapter({NAMES[0]: columns}).to("cpu"), tmp_path / "in.safetensors", format="native")
    words = ["merge", str(tmp_path / "model.safetensors"), str(tmp_path / "in.safetensors")]
    codes = {NAMES[0]: random(*u.shape, FP32, 3).cpu().to(torch.float8_e4m3fn).contiguous()}
    (tmp_path / "fp8").mkdir()
    save_file({**codes, f"{NAMES[0]}_scale_inv": torch.ones(1)}, tmp_path / "fp8" / "model.safetensors")
    (tmp_path / "fp8" / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    lt.save(Adapter({NAMES[0]: u}).to("cpu"), tmp_path / "plain.safetensors", format="native")
    coded = ["merge", str(tmp_path / "fp8"), str(tmp_path / "plain.safetensors"), "--requantise"]
    for each, place in ((words, "columns"), (coded, "codes")):
        assert cli._code([*each, "--device", "cuda", "-o", str(tmp_path / f"{place}-on")]) == 0
        assert cli._code([*each, "-o", str(tmp_path / f"{place}-off")]) == 0
        on, true = merged(tmp_path / f"{place}-on"), merged(tmp_path / f"{place}-off")
        assert torch.allclose(on[NAMES[0]].float(), true[NAMES[0]].float(), rtol=1e-5, atol=1e-6)
    assert cuda == [1, 0] * 3  # the codes, and their scale


def test_lora_to_dora_and_back(model, seen, off):
    adapter, base = model
    made, true = to_dora(adapter, base), off(to_dora, adapter, base)
    for name in NAMES:
        assert torch.allclose(torch.as_tensor(made[name].magnitude), torch.as_tensor(true[name].magnitude), rtol=2e-6)
    assert "fused_row_norms" in seen
    one = Adapter({NAMES[1]: made[NAMES[1]]})
    back, again = to_lora(one, base, rank=2), off(to_lora, one, base, rank=2)
    assert {"fused_rsvd_one", "fused_rsvd"} & set(seen)
    assert abs(back.report.total["relative_error"] - again.report.total["relative_error"]) < 1e-4


def test_squeeze_hands_all_shapes_over_at_once(model, seen, off):
    adapter, _ = model
    batched = functools.partial(lt.squeeze, adapter, rank=2)
    for name in NAMES:
        d, true = (u[name].dense().double() for u in (batched(), off(batched)))
        assert float(torch.linalg.matrix_norm(d - true)) <= 1e-2 * float(torch.linalg.matrix_norm(true))  # bf16 output
    assert "fused_truncate" in seen


def test_diagnose_of_a_dora_takes_its_norms_from_the_kernel(random, model, seen, off):
    adapter, base = model
    one = Adapter({NAMES[0]: dora(random, adapter[NAMES[0]])})
    found, true = lt.diagnose(one, base=base, k=2), off(lt.diagnose, one, base=base, k=2)
    assert "fused_row_norms" in seen
    assert found.modules[0]["update_norm"] == pytest.approx(true.modules[0]["update_norm"], rel=1e-5)


def test_a_failing_kernel_is_named_and_nothing_falls_back(random, model, seen, monkeypatch):
    adapter, base = model

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of everything")

    monkeypatch.setattr(row_norms_many, "direct", broken)
    with pytest.raises(
        lt.errors.KernelError, match=r"fused_row_norms failed: out of everything\n.*LORATOOLS_KERNELS=off"
    ):
        dora(random, adapter[NAMES[0]]).gain(base[NAMES[0]])
