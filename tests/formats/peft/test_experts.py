"""Expert stacks where the file alone does not tell: names, orientation, packing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratools as lt
from loratools.errors import FormatError, MismatchError, NameUnresolvedError, UsageError
from loratools.io.base import Base
from loratools.kinds.stack import Stack
from loratools.linalg.namespace import to_numpy

EXPERTS, RANK = 3, 2
EPS = np.finfo(np.float32).eps
MODULE = "model.layers.0.mlp.experts"
NESTED = ("base_layer.", "")  # PEFT's nesting: the parameter that is defined first lies innermost


def random(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed + sum(shape)).standard_normal(shape).astype(np.float32)


def config(*names: str, **said: Any) -> dict[str, Any]:
    targets = [f"mlp.experts.{name}" for name in names]
    return {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 3,
        "target_parameters": targets,
        "peft_version": "0.21.2",
        **said,
    }


def level(out: int, width: int, nest: str = "") -> dict[str, np.ndarray[Any, Any]]:
    prefix = f"base_model.model.{MODULE}.{nest}"
    return {
        f"{prefix}lora_A.weight": random(EXPERTS * RANK, width),
        f"{prefix}lora_B.weight": random(out, EXPERTS * RANK, seed=1),
    }


def pair(up: tuple[int, int] = (12, 8), down: tuple[int, int] = (8, 6)) -> dict[str, np.ndarray[Any, Any]]:
    return level(*up, NESTED[0]) | level(*down, NESTED[1])


def base(up: tuple[int, ...] = (3, 12, 8), down: tuple[int, ...] = (3, 8, 6), **said: Any) -> Base:
    opened = Base.open({f"{MODULE}.gate_up_proj": random(*up), f"{MODULE}.down_proj": random(*down), "norm": random(8)})
    opened.config = {"model_type": "mixtral", **said}
    return opened


def expected(
    tensors: dict[str, np.ndarray[Any, Any]], nest: str, *, expert_major: bool = False
) -> np.ndarray[Any, Any]:
    """Return the change of every expert (E, out, in), by PEFT's own einsum."""
    prefix = f"base_model.model.{MODULE}.{nest}lora_"
    a = tensors[f"{prefix}A.weight"].reshape(EXPERTS, RANK, -1)
    b = tensors[f"{prefix}B.weight"]
    if expert_major:
        return 1.5 * np.einsum("oer,eri->eoi", b.reshape(len(b), EXPERTS, RANK), a)
    return 1.5 * np.einsum("ore,eri->eoi", b.reshape(len(b), RANK, EXPERTS), a)


def close(update: Any, dense: np.ndarray[Any, Any]) -> bool:
    return bool(np.abs(to_numpy(update.dense()) - dense).max() <= 16 * EPS * np.abs(dense).max())


def test_names_come_from_the_nesting_and_the_sizes() -> None:
    tensors = pair()
    for names in (("gate_up_proj", "down_proj"), ("down_proj", "gate_up_proj")):  # the order of the config says nothing
        for known in (None, base()):
            adapter = lt.from_state_dict(tensors, config(*names), base=known)
            assert close(adapter[f"{MODULE}.gate_up_proj"], expected(tensors, NESTED[0]))
            assert close(adapter[f"{MODULE}.down_proj"], expected(tensors, NESTED[1]))
            assert bool(adapter.meta.unmergeable) == (known is None)


def test_roles_as_peft_018_had_them_are_told_by_the_shapes_of_the_base() -> None:
    tensors = pair((8, 12), (6, 8))  # in = d1, out = d2
    adapter = lt.from_state_dict(tensors, config("gate_up_proj", "down_proj", peft_version="0.18.1"), base=base())
    assert close(adapter[f"{MODULE}.gate_up_proj"], expected(tensors, NESTED[0]).swapaxes(1, 2))
    assert close(adapter[f"{MODULE}.down_proj"], expected(tensors, NESTED[1]).swapaxes(1, 2))
    assert list(lt.from_state_dict(tensors, config("gate_up_proj", "down_proj"))) == list(adapter)


@pytest.mark.parametrize(
    ("version", "model_type", "turned"),
    [("0.17.0", "mixtral", True), ("0.18.1", None, True), ("0.19.0", "mixtral", True), ("0.19.0", "gpt_oss", False),
     ("0.19.1", "mixtral", False), ("0.21.2", "gpt_oss", True), ("0.20.1.dev0@UNKNOWN", "mixtral", False)],
)  # fmt: skip
def test_square_experts_are_told_by_the_version(version: str, model_type: str | None, turned: bool) -> None:
    tensors = level(8, 8)
    known = base(down=(3, 8, 8), model_type=model_type)
    adapter = lt.from_state_dict(tensors, config("down_proj", peft_version=version), base=known)
    right = expected(tensors, "")
    assert close(adapter[f"{MODULE}.down_proj"], right.swapaxes(1, 2) if turned else right)


def test_square_experts_without_a_version_are_refused() -> None:
    with pytest.raises(MismatchError, match="square experts"):
        lt.from_state_dict(level(8, 8), config("down_proj", peft_version=None), base=base(down=(3, 8, 8)))


def test_both_packings_are_said_and_one_is_chosen(tmp_path: Path) -> None:
    tensors, said = level(8, 6), config("down_proj")
    name = f"{MODULE}.down_proj"
    peft = lt.from_state_dict(tensors, said)
    assert any("rank-major" in remark and "expert-major" in remark for remark in peft.meta.remarks)
    assert close(peft[name], expected(tensors, ""))
    told = lt.from_state_dict(tensors, said, expert_order="expert-major")
    assert not told.meta.remarks
    assert close(told[name], expected(tensors, "", expert_major=True))
    out = lt.save(told, tmp_path / "out")
    (out / "README.md").write_text("Trained with Unsloth.")
    named = lt.load(out)  # the README's word
    assert close(named[name], expected(tensors, "", expert_major=True))
    assert any("expert-major, as Unsloth" in remark for remark in named.meta.remarks)
    squeezed = lt.load(lt.save(lt.squeeze(named, rank=RANK), tmp_path / "squeezed"))
    assert close(squeezed[name], expected(tensors, "", expert_major=True))
    assert close(lt.load(out, expert_order="rank-major")[name], expected(tensors, ""))
    with pytest.raises(UsageError, match="order of experts"):
        lt.load(out, expert_order="sideways")


def test_unknown_names_stay_open_until_a_base_tells_them(tmp_path: Path) -> None:
    tensors = level(9, 8, NESTED[0]) | level(8, 5, NESTED[1])
    said = config("first", "second")
    adapter = lt.from_state_dict(tensors, said)
    assert list(adapter) == [f"{MODULE}#0", f"{MODULE}#1"]
    assert set(adapter.meta.unmergeable) == set(adapter)
    squeezed = lt.squeeze(adapter, error=0.3)
    again = lt.load(lt.save(squeezed, tmp_path / "out"))
    for name in adapter:
        assert close(again[name], to_numpy(squeezed[name].dense()))  # type: ignore[attr-defined]
    known = Base.open({f"{MODULE}.second": random(3, 9, 8), f"{MODULE}.first": random(3, 8, 5)})
    named = lt.from_state_dict(tensors, said, base=known)
    assert close(named[f"{MODULE}.second"], expected(tensors, NESTED[0]))
    with pytest.raises(NameUnresolvedError, match="different ranks or scales"):
        lt.from_state_dict(tensors, said | {"alpha_pattern": {"first": 5}})


def test_what_does_not_fit_is_refused() -> None:
    said = config("gate_up_proj", "down_proj")
    with pytest.raises(MismatchError, match="does not fit the base"):
        lt.from_state_dict(pair(), said, base=base(up=(3, 12, 7)))
    with pytest.raises(FormatError, match="do not divide into experts"):
        lt.from_state_dict(level(8, 6), config("down_proj", r=4))
    with pytest.raises(FormatError, match="do not divide into experts"):
        lt.from_state_dict(level(8, 6), config("down_proj"), base=base(down=(4, 8, 6)))
    with pytest.raises(FormatError, match="more nested wrappers"):
        lt.from_state_dict(pair(), config("down_proj"))


def test_a_stack_of_another_format_becomes_target_parameters(tmp_path: Path) -> None:
    """What MLX or GGUF call experts has no PEFT layout: nesting follows the order of definition."""
    stacks = {
        f"{MODULE}.down_proj": Stack(random(3, 8, 2), random(3, 2, 6), 2.0),
        f"{MODULE}.gate_up_proj": Stack(random(3, 12, 4), random(3, 4, 8), 1.0),
    }
    again = lt.load(lt.save(lt.Adapter(stacks), tmp_path / "out", format="peft"), base=base())
    assert set(again) == set(stacks)
    for name, stack in stacks.items():
        assert again[name].scale == stack.scale  # type: ignore[attr-defined]
        assert np.array_equal(to_numpy(again[name].b), stack.b)  # type: ignore[attr-defined]
