"""What the oracle of ``test_types`` cannot reach: butterflies, older conventions, refusals, and writing as read."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loratools as lt
from loratools.errors import ConversionError, FormatError, MismatchError, UnsupportedError
from loratools.formats.peft.refused import REASONS
from loratools.formats.peft.types import PEFT_TYPES

rng = np.random.default_rng(0)
M = "base_model.model."


def _read(tensors: dict[str, Any], base: dict[str, Any] | None = None, **config: Any) -> Any:
    arrays = {M + key: np.asarray(t, np.float32) for key, t in tensors.items()}
    return lt.from_state_dict(arrays, config, base=base)


def test_every_type_of_peft_has_a_reader_or_a_reason() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    assert {kind.value for kind in peft.PeftType} - set(PEFT_TYPES) == set()
    assert not set(REASONS) - set(PEFT_TYPES)


@pytest.mark.parametrize("factors", [2, 3])
def test_butterflies_of_several_factors(factors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT computes them by a CUDA extension alone: that is replaced by torch's block_diag, the rest is its own."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    layer = pytest.importorskip("peft.tuners.boft.layer")
    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    diagonal = staticmethod(lambda blocks: torch.stack([torch.block_diag(*level) for level in blocks]))
    monkeypatch.setattr(layer.FastBlockDiag, "apply", diagonal)
    toy = torch.nn.Module()
    toy.add_module("q", torch.nn.Linear(48, 20))
    toy.forward = lambda x: x
    w = toy.q.weight.detach().clone().numpy()
    config = peft.BOFTConfig(
        target_modules=["q"], boft_block_size=4, boft_n_butterfly_factor=factors, init_weights=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(toy, config).eval()
        tensors = {f"q.{part}": getattr(model.base_model.model.q, part)["default"].detach().numpy().copy()
                   for part in ("boft_R", "boft_s")}  # fmt: skip
        true = model.merge_and_unload().q.weight.detach().double().numpy() - w
    assert tensors["q.boft_R"].shape == (factors, 12, 4, 4)
    wide = w.astype(np.float64)
    ours = _read(tensors, peft_type="BOFT")["q.weight"].apply(wide) - wide
    assert np.abs(ours - true).max() <= 1e-6 * np.abs(true).max()  # products of m + 1 matrices in fp32


def _rotation(q: Any, terms: list[int]) -> Any:
    return sum((c * np.linalg.matrix_power(q, i) for i, c in enumerate(terms)), np.zeros_like(q))


@pytest.mark.parametrize(
    ("said", "terms"),
    [
        ({"use_cayley_neumann": True, "peft_version": "0.18.0"}, [1, 2, 2, 2, 1]),
        ({"use_cayley_neumann": True, "peft_version": "0.21.2@abc"}, [1, 2, 2, 2, 1]),
        ({"use_cayley_neumann": True, "peft_version": "0.17.1"}, [1, 2, 2, 2, 2]),
        ({"use_cayley_neumann": True}, [1, 2, 2, 2, 2]),
        ({"use_cayley_neumann": True, "num_cayley_neumann_terms": 3, "peft_version": "0.20"}, [1, 2, 2, 1]),
    ],
)
def test_the_series_of_oft_is_that_of_the_version_that_trained_it(said: dict[str, Any], terms: list[int]) -> None:
    vector, w = 0.2 * rng.standard_normal((1, 3)), rng.standard_normal((5, 3))
    adapter = _read({"q.oft_R.weight": vector}, {"q.weight": w}, peft_type="OFT", oft_block_size=3, **said)
    q = np.zeros((3, 3))
    q[np.triu_indices(3, 1)] = vector[0].astype(np.float32)
    q = q - q.T
    assert np.allclose(adapter["q.weight"].apply(w), w @ _rotation(q, terms).T, rtol=0, atol=1e-6)
    older = "peft_version" not in said or said["peft_version"].startswith("0.17")
    assert any("before 0.18" in remark for remark in adapter.meta.remarks) == older


def test_without_the_series_oft_turns_the_other_way() -> None:
    vector, w = np.full((1, 1), 0.1), np.eye(2)
    exact = _read({"q.oft_R.weight": vector}, {"q.weight": w}, peft_type="OFT")["q.weight"].apply(w)
    series = _read({"q.oft_R.weight": vector}, {"q.weight": w}, peft_type="OFT", use_cayley_neumann=True,
                   peft_version="0.20")["q.weight"].apply(w)  # fmt: skip
    assert np.allclose(exact, series.T, atol=1e-4)
    assert np.abs(exact - series).max() > 0.3


@pytest.mark.parametrize(
    ("tensors", "config", "error", "words"),
    [
        ({"q.oft_r": np.zeros((2, 2, 2))}, {"peft_type": "OFT"}, UnsupportedError, "0.15"),
        ({"q.oft_R.weight": np.zeros((2, 4))}, {"peft_type": "OFT"}, FormatError, "upper triangles"),
        ({"q.oft_R.weight": np.zeros((5, 1))}, {"peft_type": "OFT"}, MismatchError, "base"),
        ({"q.boft_R": np.zeros((1, 2, 2)), "q.boft_s": np.ones((4, 1))}, {"peft_type": "BOFT"}, FormatError, "blocks"),
        ({"q.ia3_l": np.ones((2, 3))}, {"peft_type": "IA3"}, FormatError, "vector of IA3"),
        ({"q.ia3_l": np.ones((5, 1))}, {"peft_type": "IA3"}, MismatchError, "base"),
        ({"q.road_theta": np.zeros(3), "q.road_alpha": np.ones(3)}, {"peft_type": "ROAD", "variant": "road_3"},
         FormatError, "variant"),
        ({"q.road_theta": np.zeros(2), "q.road_alpha": np.ones(2)}, {"peft_type": "ROAD", "group_size": 64},
         FormatError, "groups"),
        ({"q.peanut_A.weight": np.zeros((2, 4)), "q.peanut_B.weight": np.zeros((4, 2))},
         {"peft_type": "PEANUT", "act_fn": "xielu"}, UnsupportedError, "xielu"),
        ({"q.deft_P": np.zeros((4, 2)), "q.deft_R": np.zeros((2, 6))},
         {"peft_type": "DEFT", "decomposition_method": "svd"}, FormatError, "decomposition_method"),
        ({"q.supertuning_values": np.zeros(3)}, {"peft_type": "SUPERTUNING"}, UnsupportedError, "ties"),
        ({"q.psoft_R.weight": np.zeros(1)}, {"peft_type": "PSOFT", "r": 2, "psoft_svd": "lowrank"}, UnsupportedError,
         "randomised"),
        ({"q.frod_lambda_l": np.zeros(6), "q.frod_lambda_s_values": np.zeros(2)}, {"peft_type": "FROD"},
         UnsupportedError, "joint decomposition"),
        ({"q.trainable_tokens_delta": np.zeros((2, 6))}, {"peft_type": "TRAINABLE_TOKENS"}, FormatError,
         "token_indices"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_with_its_reason(
    tensors: dict[str, Any], config: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        _read(tensors, {"q.weight": np.zeros((4, 6), np.float32)}, **config)


def test_ia3_on_the_inputs_of_a_grouped_convolution_is_refused() -> None:
    base = {"c.weight": np.zeros((6, 2, 3, 3), np.float32)}
    with pytest.raises((UnsupportedError, MismatchError)):
        _read({"c.ia3_l": np.ones((1, 4, 1, 1))}, base, peft_type="IA3", feedforward_modules=["c"])


def test_one_type_over_the_tensors_of_another_is_refused() -> None:
    tensors = {"q.lora_A.weight": np.zeros((2, 6)), "q.lora_B.weight": np.zeros((4, 2))}
    for other in ("HRA", "IA3", "OFT", "LOKR", "VERA", "GLORA"):
        with pytest.raises(FormatError):
            _read(tensors, peft_type=other)


@pytest.mark.parametrize(
    ("config", "fields", "layers"),
    [
        ("LNTuningConfig", {}, ("norm",)),
        ("TrainableTokensConfig", {"token_indices": [5, 1, 30]}, ("embedding",)),
        ("BeftConfig", {}, ("down", "up")),
    ],
)
def test_what_no_lora_says_is_written_as_it_was_read(
    config: str, fields: dict[str, Any], layers: tuple[str, ...], oracle: Callable[..., Any], tmp_path: Path
) -> None:
    made = oracle(config, layers, **fields)
    for done in (made.read(), lt.squeeze(made.read(), rank=2), lt.convert(made.read(), "peft")):
        lt.save(done, tmp_path / "again", overwrite=True)
        before, after = (load_file(f / "adapter_model.safetensors") for f in (made.folder, tmp_path / "again"))
        assert before.keys() == after.keys()
        assert all(np.array_equal(t, after[key]) for key, t in before.items())
        said = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
        assert said["peft_type"] == json.loads((made.folder / "adapter_config.json").read_text())["peft_type"]


def test_a_bias_alone_is_no_lora(oracle: Callable[..., Any]) -> None:
    made = oracle("BeftConfig", ("down",))
    lora = lt.convert(made.read(), "native")
    changed = {name: type(u)(u.d.read() * 2) for name, u in lora.items()}
    with pytest.raises(ConversionError):
        lt.save(replace(lora, updates=changed), made.folder / "out", format="peft")


def test_psoft_says_that_signs_decide_and_needs_torch(oracle: Callable[..., Any], monkeypatch: Any) -> None:
    import builtins

    from loratools.errors import MissingExtraError

    made = oracle("PsoftConfig", ("down",), r=4)
    adapter = made.read()
    assert any("signs" in remark for remark in adapter.meta.remarks)
    genuine = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "torch":
            raise ImportError(name)
        return genuine(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match="signs"):
        made.read()["down.weight"].dense()


def test_modules_to_save_and_biases_come_along(oracle: Callable[..., Any]) -> None:
    made = oracle("IA3Config", ("down",), feedforward_modules=[])
    weights = made.folder / "adapter_model.safetensors"
    head = np.ones((3, 3), np.float32)
    save_file({**load_file(weights), f"{M}head.weight": head}, weights)
    config = json.loads((made.folder / "adapter_config.json").read_text())
    (made.folder / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["head"]}))
    adapter = made.read()
    assert adapter["head.weight"].kind == "replace"
    done = lt.squeeze(adapter, rank=24, base={**made.base, "head.weight": head})
    lt.save(done, made.folder / "lora", format="peft")
    again = lt.load(made.folder / "lora")
    assert {name: u.kind for name, u in again.items()} == {
        "down.weight": "lowrank", "down.bias": "dense", "head.weight": "replace",
    }  # fmt: skip
