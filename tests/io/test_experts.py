from __future__ import annotations

import pytest

from loratools.io.experts import stacked_shape, stored_apart

E, H, I = 3, 8, 5  # noqa: E741 - experts, hidden and inner width


def model(module: str, up: tuple[str, ...], down: str, *, prefix: str = "model.") -> dict[str, tuple[int, ...]]:
    names = {f"{prefix}layers.0.{module}.{e}.{leaf}.weight": (I, H) for e in range(E) for leaf in up}
    names |= {f"{prefix}layers.0.{module}.{e}.{down}.weight": (H, I) for e in range(E)}
    return names | {f"{prefix}layers.0.mlp.shared_expert.gate_proj.weight": (I, H), "norm.weight": (H,)}


@pytest.mark.parametrize(
    ("module", "up", "down"),
    [("mlp.experts", ("gate_proj", "up_proj"), "down_proj"), ("block_sparse_moe.experts", ("w1", "w3"), "w2")],
)
@pytest.mark.parametrize("prefix", ["model.", "", "model.language_model."])
def test_the_spellings_of_the_hub(module: str, up: tuple[str, ...], down: str, prefix: str) -> None:
    shapes = model(module, up, down, prefix=prefix)
    wanted = [f"layers.0.mlp.experts.{p}" for p in ("gate_up_proj", "down_proj")]
    found = stored_apart(wanted, shapes)
    where = f"{prefix}layers.0.{module}"
    assert found[wanted[0]] == [tuple(f"{where}.{e}.{leaf}.weight" for leaf in up) for e in range(E)]
    assert found[wanted[1]] == [(f"{where}.{e}.{down}.weight",) for e in range(E)]
    assert [stacked_shape(found[n], shapes) for n in wanted] == [(E, 2 * I, H), (E, H, I)]


def test_what_is_incomplete_or_uneven_is_not_found() -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    whole = model("mlp.experts", ("gate_proj", "up_proj"), "down_proj")
    assert stored_apart([name], whole)
    lost = {n: s for n, s in whole.items() if ".1.up_proj" not in n}
    uneven = whole | {"model.layers.0.mlp.experts.1.up_proj.weight": (I + 1, H)}
    packed = whole | {"model.layers.0.mlp.experts.1.up_proj.weight": (I,)}
    twice = whole | {n.replace("model.", "other.", 1): s for n, s in whole.items()}
    for shapes in (lost, uneven, packed, twice):
        assert not stored_apart([name.removeprefix("model.")], shapes)
    assert not stored_apart(["model.layers.1.mlp.experts.gate_up_proj", "lm_head.weight"], whole)
