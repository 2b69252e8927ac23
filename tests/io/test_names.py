from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.errors import MismatchError
from loratools.io.names import resolve

LLAMA = ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"] + [
    f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(12) for p in "qkvo"
]
Q = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(12)]


def test_exact_names() -> None:
    assert resolve(Q, LLAMA) == {name: name for name in Q}
    assert resolve([], LLAMA) == {}


@pytest.mark.parametrize("prefix", ["transformer.", "a.b.c."])
def test_one_prefix_added_or_removed(prefix: str) -> None:
    longer = [prefix + name for name in LLAMA]
    assert resolve(Q, longer) == {name: prefix + name for name in Q}
    assert resolve([prefix + name for name in Q], LLAMA) == {prefix + name: name for name in Q}


def test_one_prefix_decides_where_suffixes_alone_could_not() -> None:
    base = [f"encoder.layers.{i}.fc.weight" for i in range(3)] + [
        "decoder.layers.0.fc.weight",
        "decoder.layers.9.x.weight",
    ]
    names = [f"layers.{i}.fc.weight" for i in range(3)]
    assert resolve(names, base) == {name: f"encoder.{name}" for name in names}


def test_two_possible_prefixes_are_an_error() -> None:
    base = [f"{tower}.layers.{i}.fc.weight" for tower in ("encoder", "decoder") for i in range(3)]
    with pytest.raises(MismatchError, match="3 of 3") as caught:
        resolve([f"layers.{i}.fc.weight" for i in range(3)], base)
    assert caught.value.got == "layers.0.fc.weight, layers.1.fc.weight, layers.2.fc.weight"


def test_unique_suffixes_where_prefixes_differ() -> None:
    base = ["text.encoder.block.0.fc.weight", "vision.stem.conv.weight"]
    assert resolve(["block.0.fc.weight", "stem.conv.weight"], base) == {
        "block.0.fc.weight": base[0],
        "stem.conv.weight": base[1],
    }


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("model.layers.", "model.language_model.layers."),
        ("model.layers.", "language_model.model.layers."),
        ("language_model.model.layers.", "model.language_model.layers."),
        ("lm_head.", "language_model.lm_head."),
        ("visual.", "model.visual."),
    ],
)
def test_renamed_trees_both_ways(old: str, new: str) -> None:
    tails = [f"{i}.fc.weight" for i in range(3)]
    others = ["model.visual_extra.weight", "something.else.weight"]
    for one, two in ((old, new), (new, old)):
        found = resolve([one + t for t in tails], [two + t for t in tails] + others)
        assert found == {one + t: two + t for t in tails}


def test_a_renamed_vision_language_model_as_a_whole() -> None:
    names = [
        "language_model.model.layers.0.q.weight",
        "vision_tower.blocks.0.q.weight",
        "language_model.lm_head.weight",
    ]
    base = ["model.language_model.layers.0.q.weight", "model.vision_tower.blocks.0.q.weight", "lm_head.weight"]
    assert resolve(names, base) == dict(zip(names, base, strict=True))


def test_missing_names_are_counted_and_three_are_shown() -> None:
    names = [f"model.layers.{i}.mlp.w.weight" for i in range(12)] + Q
    with pytest.raises(MismatchError, match="12 of 24") as caught:
        resolve(names, LLAMA)
    assert str(caught.value.got).count("mlp") == 3


def test_tied_heads_are_explained() -> None:
    base = [name for name in LLAMA if name != "lm_head.weight"]
    with pytest.raises(MismatchError) as caught:
        resolve(["lm_head.weight", *Q], base)
    assert "ties lm_head.weight to model.embed_tokens.weight" in (caught.value.hint or "")


def test_two_names_for_one_parameter() -> None:
    with pytest.raises(MismatchError, match="two names") as caught:
        resolve(["lm_head.weight", "wrapper.lm_head.weight", *Q], LLAMA)
    assert "lm_head.weight" in str(caught.value.got)


def test_optional_names() -> None:
    names = [*Q, "classifier.weight", "model.norm.weight"]
    assert resolve(names, LLAMA, optional={"classifier.weight", "model.norm.weight"}) == {
        name: name for name in [*Q, "model.norm.weight"]
    }
    longer = [f"wrapped.{name}" for name in LLAMA]
    found = resolve(names, longer, optional={"classifier.weight", "model.norm.weight"})
    assert found["model.norm.weight"] == "wrapped.model.norm.weight" and "classifier.weight" not in found
    assert resolve(["classifier.weight"], LLAMA, optional={"classifier.weight"}) == {}


def test_one_part_alone_is_no_suffix() -> None:
    with pytest.raises(MismatchError):
        resolve(["weight", "b.c"], ["a.weight", "b.c"])


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(".".join), unique=True, max_size=8), st.data()
)
def test_results_are_one_to_one_and_exact_names_win(base: list[str], data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from([*base, "x.a", "b.x"]), unique=True))
    try:
        found = resolve(names, base)
    except MismatchError:
        assert any(name not in base for name in names)
        return
    assert list(found) == names and len(set(found.values())) == len(names) and set(found.values()) <= set(base)


def test_the_router_of_a_mixtral_file() -> None:
    base = ["model.layers.0.block_sparse_moe.gate.weight", "model.layers.0.self_attn.q_proj.weight"]
    names = ["model.layers.0.mlp.gate.weight", "model.layers.0.self_attn.q_proj.weight"]
    assert resolve(names, base) == dict(zip(names, base, strict=True))
