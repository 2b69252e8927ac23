"""What cannot be merged says so, and what PEFT does not define is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratools as lt
from loratools.errors import FormatError, MismatchError, UnsupportedError
from loratools.linalg.namespace import to_numpy

PREFIX = "base_model.model."
EPS = np.finfo(np.float32).eps


def zeros(*shape: int) -> np.ndarray[Any, Any]:
    return np.zeros(shape, np.float32)


def config(**said: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"], **said}


def tensors(**more: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    plain = {"q.lora_A.weight": np.ones((4, 12), np.float32), "q.lora_B.weight": np.ones((10, 4), np.float32)}
    return {PREFIX + key: t for key, t in (plain | {f"q.{k}": t for k, t in more.items()}).items()}


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"alora_invocation_tokens": [1, 2]}, "after its invocation"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "repeats"),
    ],
)
def test_what_is_no_change_of_weights_is_compressed_and_marked(
    said: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    adapter = lt.from_state_dict(tensors(), config(**said))
    again = lt.load(lt.save(lt.squeeze(adapter, rank=1), tmp_path / "out"))
    native = lt.load(lt.save(adapter, tmp_path / "native.safetensors", format="native"))
    for one in (adapter, again, native):
        assert set(one.meta.unmergeable) == {"q.weight"}
        assert reason in one.meta.unmergeable["q.weight"]
    assert any("not merged" in remark for remark in adapter.meta.remarks)


def test_an_activated_lora_of_peft(make: Callable[..., Any], reload: Callable[..., Any], tmp_path: Path) -> None:
    made = make(
        "llama", r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[3, 4]
    )
    expected = made.logits(made.model)
    adapter = lt.load(made.folder)
    assert adapter.meta.unmergeable.keys() == adapter.keys()
    got = made.logits(reload(made, lt.save(lt.squeeze(adapter, rank=64), tmp_path / "out")))
    assert (got - expected).abs().max() <= 1e-5 * max(expected.abs().max(), 1)


def test_a_grouped_convolution_is_compressed_group_by_group(
    make: Callable[..., Any], reload: Callable[..., Any], tmp_path: Path
) -> None:
    made = make("grouped", r=4, lora_alpha=8, target_modules=["mix", "point"])
    expected = made.logits(made.model)
    adapter = lt.load(made.folder)
    assert adapter["mix.weight"].shape == (2, 4, 6, 3, 1)
    assert set(adapter.meta.unmergeable) == {"mix.weight"}
    same = lt.save(adapter, tmp_path / "same")
    assert (same / "adapter_model.safetensors").read_bytes() == (made.folder / "adapter_model.safetensors").read_bytes()
    got = made.logits(reload(made, lt.save(lt.squeeze(adapter, rank=64), tmp_path / "full")))
    assert (got - expected).abs().max() <= 1e-5 * max(expected.abs().max(), 1)
    cut = lt.squeeze(adapter, rank=1)
    reload(made, lt.save(cut, tmp_path / "cut"))  # the rank, 2, is divisible by the groups
    d, best = to_numpy(adapter["mix.weight"].dense()), to_numpy(cut["mix.weight"].dense())  # type: ignore[attr-defined]
    for group in range(2):
        u, s, vh = np.linalg.svd(d[group].reshape(4, -1).astype(np.float64), full_matrices=False)
        assert np.abs(best[group].reshape(4, -1) - s[0] * np.outer(u[:, 0], vh[0])).max() <= 1e-5 * s[0]


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"lora_E": zeros(4, 1)}, "AdaLoRA"),
        ({"lora_unheard_of": zeros(4)}, "lora_unheard_of"),
        ({"lora_embedding_A": zeros(4, 9), "lora_embedding_B": zeros(3, 4)}, "on an embedding"),
        ({"token_adapter.trainable_tokens_delta": zeros(2, 12)}, "on trainable tokens"),
    ],
)
def test_leaves_that_do_not_belong_together_are_named(more: dict[str, Any], match: str) -> None:
    with pytest.raises(UnsupportedError, match=match):
        lt.from_state_dict(tensors(**more), config())


def test_an_arrow_router_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="Arrow router"):
        lt.from_state_dict(tensors(), config(arrow_config={"top_k": 3}))


def test_dora_on_a_grouped_convolution_is_refused() -> None:
    grouped = {
        PREFIX + "q.lora_A.weight": zeros(4, 6, 3), PREFIX + "q.lora_B.weight": zeros(8, 2, 1),
        PREFIX + "q.lora_magnitude_vector": zeros(1, 8, 1),
    }  # fmt: skip
    with pytest.raises(UnsupportedError, match="mixes up the groups"):
        lt.from_state_dict(grouped, config())


@pytest.mark.parametrize(
    ("a", "b"),
    [((4, 6, 3), (8, 3, 1)), ((4, 6, 3), (8, 4, 3)), ((4, 6, 3, 3), (8, 4, 1)), ((4, 12), (10, 3)), ((4,), (10, 4))],
)
def test_factors_that_do_not_multiply(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(FormatError, match="do not multiply"):
        lt.from_state_dict({PREFIX + "q.lora_A.weight": zeros(*a), PREFIX + "q.lora_B.weight": zeros(*b)}, config())


def test_shapes_are_checked_against_the_base() -> None:
    conv = {PREFIX + "q.lora_A.weight": zeros(4, 6, 3), PREFIX + "q.lora_B.weight": zeros(8, 4, 1)}
    assert lt.from_state_dict(conv, config(), base={"q.weight": zeros(8, 6, 3)})["q.weight"].shape == (8, 6, 3)
    with pytest.raises(MismatchError, match="does not fit the base"):
        lt.from_state_dict(conv, config(), base={"q.weight": zeros(8, 6, 5)})


def test_rows_of_tokens_need_their_numbers() -> None:
    rows = tensors() | {PREFIX + "emb.token_adapter.trainable_tokens_delta": zeros(2, 12)}
    assert lt.from_state_dict(rows, config(trainable_token_indices=[3, 1]))["emb.weight"].kind == "replace_rows"
    for said in (None, {"other": [1, 2]}, "all", [1.5, 2]):
        with pytest.raises(FormatError, match="which rows"):
            lt.from_state_dict(rows, config(trainable_token_indices=said))
    for numbers in ([1, 2, 3], [1, 1], [-1, 2]):
        with pytest.raises(FormatError, match=r"rows do not fit|repeats or is out of range"):
            lt.from_state_dict(rows, config(trainable_token_indices=numbers))
    with pytest.raises(FormatError, match="out of range"):
        base = {"q.weight": zeros(10, 12), "emb.weight": zeros(3, 12)}
        lt.from_state_dict(rows, config(trainable_token_indices=[3, 1]), base=base)


def test_a_saved_embedding_of_another_size_than_the_bases(tmp_path: Path) -> None:
    """A vocabulary resized before training: the file's own embedding counts, and the update goes on top of it."""
    said = config(target_modules=["embed_tokens"])
    value = np.arange(24, dtype=np.float32).reshape(8, 3)
    a, b = np.ones((4, 8), np.float32), np.full((3, 4), 0.5, np.float32)
    stored = {
        "embed_tokens.lora_embedding_A": a,
        "embed_tokens.lora_embedding_B": b,
        "embed_tokens.base_layer.weight": value,
    }
    adapter = lt.from_state_dict(
        {PREFIX + k: t for k, t in stored.items()}, said, base={"embed_tokens.weight": zeros(6, 3)}
    )
    assert np.abs(adapter["embed_tokens.weight"].apply(None) - (value + 2 * (b @ a).T)).max() <= 64 * EPS
    again = lt.load(lt.save(lt.squeeze(adapter, rank=1), tmp_path / "out"))
    assert np.abs(again["embed_tokens.weight"].apply(None) - (value + 2 * (b @ a).T)).max() <= 1e-5


def test_several_adapters_in_one_file_are_listed() -> None:
    both = {
        k.replace("lora_A", f"lora_A.{n}").replace("lora_B", f"lora_B.{n}"): t
        for n in ("en", "de")
        for k, t in tensors().items()
    }
    with pytest.raises(FormatError, match="several adapters in one file") as caught:
        lt.from_state_dict(both, config())
    assert caught.value.got == "de, en"
    assert "selected_adapters" in str(caught.value.hint)
