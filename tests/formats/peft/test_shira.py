"""SHiRA files: PEFT itself is the witness; sizes come from where they may, and what PEFT could not load is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratools as lt
from loratools.core.adapter import Adapter
from loratools.errors import ConversionError, FormatError, LoratoolsError, NeedsBaseError
from loratools.formats.peft.shira import SHAPES, Shira
from loratools.io.bundle import Bundle, from_memory
from loratools.kinds.replace import Replace
from loratools.kinds.sparse import of_entries

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")


def model() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(24, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))


def trained(folder: Path, seed: int = 1) -> tuple[Any, Any]:
    """Return a model with a random SHiRA adapter, saved by PEFT, and an input."""
    config = peft.ShiraConfig(r=3, target_modules=["0", "2"], init_weights=False, random_seed=seed)
    made = peft.get_peft_model(model(), config)
    made.save_pretrained(folder)
    return made.eval(), torch.randn(5, 24)


def test_reads_what_peft_writes(tmp_path: Path) -> None:
    made, _ = trained(tmp_path)
    for base in (None, {n: p.detach().numpy() for n, p in model().state_dict().items()}):
        adapter = lt.load(tmp_path, base=base)
        for name, u in adapter.items():
            module = made.base_model.model.get_submodule(name.removesuffix(".weight"))
            assert np.array_equal(u.dense(), module.get_delta_weight("default").to_dense().detach().numpy())


def test_peft_loads_what_we_write_with_equal_logits(tmp_path: Path) -> None:
    made, x = trained(tmp_path / "in")
    lt.save(lt.load(tmp_path / "in"), tmp_path / "out")
    again = peft.PeftModel.from_pretrained(model(), tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(made(x), again(x))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_peft_loads_a_shira_of_a_lora_with_equal_logits(dtype: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"], init_lora_weights=False)
    peft.get_peft_model(model(), config).save_pretrained(tmp_path / "lora")
    done = lt.shira(lt.load(tmp_path / "lora"), density=0.4, dtype=dtype)
    lt.save(done, tmp_path / "out")
    x, folded = torch.randn(5, 24), model()
    told = peft.PeftModel.from_pretrained(model(), tmp_path / "out").eval()
    state = folded.state_dict()
    folded.load_state_dict(
        {n: torch.from_numpy(done[n].apply(w.numpy())) if n in done else w for n, w in state.items()}
    )
    with torch.no_grad():
        assert torch.equal(told(x), folded(x))


def bundle(index: Any, values: Any, *, r: int = 1, metadata: dict[str, str] | None = None) -> Bundle:
    key = "base_model.model.x.shira_"
    return from_memory({f"{key}weight": values, f"{key}indices": index}, {"peft_type": "SHIRA", "r": r}, metadata)


def square(n: int = 4) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    flat = np.sort(rng.permutation(n * n - 1)[: 2 * n])  # the last row and column may be empty
    return np.stack([flat // n, flat % n]).astype(np.int32), rng.standard_normal(2 * n).astype(np.float32)


def test_indices_from_windows_are_floats() -> None:
    index, values = square()
    same = [
        Shira().decode(bundle(i, values, metadata={SHAPES: '{"x": [4, 4]}'}))["x.weight"].dense()
        for i in (index, index.astype(np.float32))
    ]
    assert np.array_equal(*same)
    with pytest.raises(FormatError, match="whole"):
        Shira().decode(bundle(index + np.float32(0.5), values))


def test_an_unknown_size_needs_the_base() -> None:
    index, values = np.array([[0, 1, 0], [0, 1, 1]], np.int32), np.ones(3, np.float32)
    with pytest.raises(NeedsBaseError):
        Shira().decode(bundle(index, values, r=1))
    from loratools.io.base import Base

    base = Base.open({"x.weight": np.zeros((7, 9), np.float32)})
    assert Shira().decode(bundle(index, values), base=base)["x.weight"].shape == (7, 9)


@pytest.mark.parametrize(
    ("index", "values"),
    [
        (np.zeros((2, 3), np.int32), np.ones(2, np.float32)),
        (np.zeros((3, 2), np.int32), np.ones(2, np.float32)),
        (np.zeros((2, 0), np.int32), np.ones(0, np.float32)),
        (np.full((2, 2), -1, np.int32), np.ones(2, np.float32)),
        (np.full((2, 2), np.nan, np.float32), np.ones(2, np.float32)),
        (np.zeros((2, 2), np.int32), np.ones(2, np.int32)),
    ],
)
def test_broken_modules_are_refused(index: Any, values: Any) -> None:
    with pytest.raises(LoratoolsError) as told:
        Shira().decode(bundle(index, values, metadata={SHAPES: '{"x": [4, 4]}'}))
    assert told.value.parameter == "x.weight"


def test_half_a_module_and_foreign_tensors_are_refused() -> None:
    whole = bundle(*square(), metadata={SHAPES: '{"x": [4, 4]}'})
    with pytest.raises(FormatError, match="half"):
        Shira().decode(replace(whole, tensors=dict(list(whole.tensors.items())[:1])))
    odd = {**whole.tensors, "base_model.model.y.weight": next(iter(whole.tensors.values()))}
    with pytest.raises(FormatError, match="explain"):
        Shira().decode(replace(whole, tensors=odd))
    carried = Shira().decode(replace(whole, tensors=odd), allow_unknown=True)
    assert list(carried.meta.leftover) == ["base_model.model.y.weight"]


def test_sizes_that_peft_cannot_load_are_refused() -> None:
    one, two = (of_entries(np.arange(k, dtype=np.int64), np.ones(k, np.float32), (4, 6)) for k in (10, 20))
    odd = of_entries(np.arange(7, dtype=np.int64), np.ones(7, np.float32), (4, 6))
    for updates in ({"a.weight": odd}, {"a.weight": one, "b.weight": two}):
        with pytest.raises(ConversionError) as told:
            Shira().encode(Adapter(updates))
        assert "native" in str(told.value)
    assert Shira().encode(Adapter({"a.weight": two})).config["r"] == 2  # type: ignore[index]


def test_saved_modules_travel() -> None:
    head = Replace(np.ones((3, 3), np.float32))
    one = of_entries(np.arange(10, dtype=np.int64), np.ones(10, np.float32), (4, 6))
    encoded = Shira().encode(Adapter({"a.weight": one, "head.weight": head}))
    assert encoded.config["modules_to_save"] == ["head"]  # type: ignore[index]
    assert list(Shira().decode(from_memory(encoded.tensors, encoded.config, encoded.metadata))) == [
        "a.weight",
        "head.weight",
    ]
