"""Every type against PEFT itself: our update equals ``merge_and_unload() - W``, bias changes included.

A row of ``TYPES`` is one config of a type and the layers that PEFT accepts for it; every other layer it refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from loratools.errors import LoratoolsError, NeedsBaseError

LINEAR = ("down", "up", "square")
CONV1D = ("turned", "turned_square")
LAYERS = (*LINEAR, *CONV1D, "conv", "point", "line", "embedding", "norm")  # of the toy: see conftest.py
TOLERANCE = 5e-7  # of max|D|: PEFT's products in fp32; and of its rounding of W', where |W| is the larger


@dataclass(frozen=True)
class Type:
    """``needs``: nothing, the base's ``shapes``, or its ``values``. Conv1D goes apart: its flag is for all modules.

    ``may`` are last names of tensors that a file may lack.
    """

    config: str
    fields: dict[str, Any] = field(default_factory=dict)
    layers: tuple[str, ...] = LINEAR
    needs: str = ""
    may: tuple[str, ...] = ()

    @property
    def models(self) -> list[list[str]]:
        """The layers of each toy model."""
        apart = [layer in CONV1D for layer in self.layers]
        both = [[n for n, own in zip(self.layers, apart, strict=True) if own == turned] for turned in (False, True)]
        return [names for names in both if names]


TYPES: dict[str, Type] = {
    "adalora": Type("AdaLoraConfig", {"init_r": 4, "lora_alpha": 8, "total_step": 10},
                    (*LINEAR, *CONV1D, "conv", "point")),
    "loha": Type("LoHaConfig", {"r": 3, "alpha": 5}, (*LINEAR, "conv", "point", "line")),
    "loha-cores": Type("LoHaConfig", {"r": 3, "alpha": 5, "use_effective_conv2d": True},
                       (*LINEAR, "conv", "point", "line")),
    "lokr": Type("LoKrConfig", {"r": 3, "alpha": 5, "decompose_factor": 4}, (*LINEAR, "conv", "point", "line")),
    "lokr-both": Type("LoKrConfig", {"r": 2, "alpha": 5, "decompose_both": True, "decompose_factor": 4},
                      (*LINEAR, "conv", "point", "line")),
    "lokr-cores": Type("LoKrConfig", {"r": 1, "alpha": 5, "decompose_factor": 2, "use_effective_conv2d": True},
                       (*LINEAR, "conv", "point")),
    "lokr-whole": Type("LoKrConfig", {"r": 64, "alpha": 5}, (*LINEAR, "conv", "point", "line")),
    "vera": Type("VeraConfig", {"r": 5}, (*LINEAR, *CONV1D), "shapes"),
    "vera-drawn": Type("VeraConfig", {"r": 5, "save_projection": False}, (*LINEAR, *CONV1D), "shapes"),
    "pvera": Type("PveraConfig", {"r": 5}, (*LINEAR, *CONV1D), "shapes"),
    "pvera-drawn": Type("PveraConfig", {"r": 5, "save_projection": False}, (*LINEAR, *CONV1D), "shapes"),
    "miss": Type("MissConfig", {"r": 5}, needs="shapes"),
    "miss-mini": Type("MissConfig", {"r": 4, "mini_r": 6, "init_weights": "mini"}, needs="shapes"),
    "miss-bat": Type("MissConfig", {"r": 4, "init_weights": "bat"}, needs="shapes"),
    "fourierft": Type("FourierFTConfig", {"n_frequency": 40}, (*LINEAR, *CONV1D), "shapes"),
    "waveft": Type("WaveFTConfig", {"n_frequency": 40}, (*LINEAR, *CONV1D), "shapes"),
    "waveft-db4": Type("WaveFTConfig", {"n_frequency": 40, "wavelet_family": "db4"}, (*LINEAR, *CONV1D), "shapes"),
    "waveft-coif2": Type("WaveFTConfig", {"n_frequency": 40, "wavelet_family": "coif2"}, (*LINEAR, *CONV1D),
                         "shapes"),
    "waveft-plain": Type("WaveFTConfig", {"n_frequency": 40, "use_idwt": False}, (*LINEAR, *CONV1D), "shapes"),
    "randlora": Type("RandLoraConfig", {"r": 5}, (*LINEAR, *CONV1D), "shapes", may=("randlora_A", "randlora_B")),
    "randlora-drawn": Type("RandLoraConfig", {"r": 5, "save_projection": False}, (*LINEAR, *CONV1D), "shapes"),
    "randlora-sparse": Type("RandLoraConfig", {"r": 6, "save_projection": False, "sparse": True},
                            (*LINEAR, *CONV1D), "shapes"),
    "randlora-sparser": Type("RandLoraConfig", {"r": 6, "save_projection": False, "very_sparse": True},
                             (*LINEAR, *CONV1D), "shapes"),
    "unilora": Type("UniLoraConfig", {"r": 3, "theta_d_length": 50}, (*LINEAR, *CONV1D), "shapes"),
    "unilora-indices": Type("UniLoraConfig", {"r": 3, "theta_d_length": 50, "save_indices": True}, (*LINEAR, *CONV1D)),
    "tinylora": Type("TinyLoraConfig", {"r": 3, "u": 5}, (*LINEAR, *CONV1D, "embedding"), "shapes"),
    "tinylora-one": Type("TinyLoraConfig", {"r": 3, "u": 5, "weight_tying": 1.0}, (*LINEAR, *CONV1D, "embedding")),
    "tinylora-drawn": Type("TinyLoraConfig", {"r": 3, "u": 5, "weight_tying": 0.5, "save_projection": False},
                           (*LINEAR, *CONV1D, "embedding"), "shapes"),
    "tinylora-short": Type("TinyLoraConfig", {"r": 2, "u": 3, "save_projection": False},
                           (*LINEAR, *CONV1D, "embedding"), "shapes"),
    "vblora": Type("VBLoRAConfig", {"r": 3, "num_vectors": 20, "vector_length": 4, "topk": 2, "init_logits_std": 1.0},
                   (*LINEAR, *CONV1D)),
    "vblora-topk": Type("VBLoRAConfig", {"r": 3, "num_vectors": 20, "vector_length": 4, "topk": 3,
                                         "save_only_topk_weights": True}, (*LINEAR, *CONV1D)),
    "vblora-one": Type("VBLoRAConfig", {"r": 3, "num_vectors": 20, "vector_length": 4, "topk": 1,
                                        "save_only_topk_weights": True}, (*LINEAR, *CONV1D), may=("_weights",)),
    "c3a": Type("C3AConfig", {"block_size": 6}),
    "delora": Type("DeloraConfig", {"r": 3}),
    "gralora": Type("GraloraConfig", {"r": 6, "gralora_k": 3, "alpha": 4}, (*LINEAR, *CONV1D)),
    "gralora-hybrid": Type("GraloraConfig", {"r": 4, "gralora_k": 2, "hybrid_r": 2}, (*LINEAR, *CONV1D)),
    "ia3": Type("IA3Config", {"feedforward_modules": []}, (*LINEAR, *CONV1D, "conv", "point"), "shapes"),
    "ia3-inputs": Type("IA3Config", {"feedforward_modules": ".*"},
                       (*LINEAR, *CONV1D, "conv", "point"), "shapes"),
    "oft": Type("OFTConfig", {"oft_block_size": 4}, (*LINEAR, "conv", "point", "embedding"), "shapes"),
    "oft-exact": Type("OFTConfig", {"oft_block_size": 3, "use_cayley_neumann": False},
                      (*LINEAR, "conv", "point", "embedding"), "shapes"),
    "oft-shared": Type("OFTConfig", {"oft_block_size": 4, "block_share": True},
                       (*LINEAR, "conv", "point", "embedding"), "shapes"),
    "oft-coft": Type("OFTConfig", {"r": 6, "oft_block_size": 0, "coft": True, "eps": 2.0},
                     (*LINEAR, "conv", "point", "embedding"), "shapes"),
    "boft": Type("BOFTConfig", {"boft_block_size": 4}, (*LINEAR, "conv", "point")),
    "hra": Type("HRAConfig", {"r": 4}, (*LINEAR, "conv", "point"), "shapes"),
    "hra-gs": Type("HRAConfig", {"r": 3, "apply_GS": True}, (*LINEAR, "conv", "point"), "shapes"),
    "road-1": Type("RoadConfig", {"variant": "road_1", "group_size": 4}, LINEAR, "shapes"),
    "road-2": Type("RoadConfig", {"variant": "road_2", "group_size": 12}, LINEAR, "shapes"),
    "road-4": Type("RoadConfig", {"variant": "road_4", "group_size": 2}, LINEAR, "shapes"),
    "hira": Type("HiraConfig", {"r": 4}, (*LINEAR, *CONV1D, "conv", "point", "line", "embedding")),
    "osf": Type("OSFConfig", {"effective_rank": 8}, LINEAR),
    "ln_tuning": Type("LNTuningConfig", {}, LAYERS, may=("bias",)),
    "trainable_tokens": Type("TrainableTokensConfig", {"token_indices": [5, 1, 30]}, ("up", "embedding"), "rows"),
    "beft": Type("BeftConfig", {}, LINEAR),
    "glora": Type("GloraConfig", {"r": 3}, LINEAR, "shapes", may=("Xd", "Xu", "X", "zeros")),
    "glora-vectors": Type("GloraConfig", {"r": 3, "config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
                          LINEAR, "shapes", may=("X",)),
    "glora-numbers": Type("GloraConfig", {"r": 3, "config_A_B": "constant", "config_C": "none",
                                          "config_D_E": "constant"}, LINEAR, "shapes", may=("X", "zeros")),
    "psoft": Type("PsoftConfig", {"r": 4}, LINEAR, "shapes"),
    "psoft-roots": Type("PsoftConfig", {"r": 4, "psoft_alpha": 9, "ab_svd_init": "pissa_init", "psoft_mag_a": False,
                                        "use_cayley_neumann": True, "cayley_neumann_eps": 0.5}, LINEAR, "shapes"),
    "psoft-whole": Type("PsoftConfig", {"r": 4, "psoft_orth": False}, LINEAR, "shapes"),
    "peanut": Type("PeanutConfig", {"r": 4, "depth": 2}, LINEAR, "shapes"),
    "peanut-flat": Type("PeanutConfig", {"r": 4, "depth": 0, "act_fn": "silu", "scaling": 0.5}, LINEAR, "shapes"),
    "frod": Type("FrodConfig", {"sparse_rate": 0.1}, (*LINEAR, *CONV1D), "shapes", may=("down", "turned")),
    "deft": Type("DeftConfig", {"r": 4, "alpha": 6}, (*LINEAR, *CONV1D)),
    "deft-qr": Type("DeftConfig", {"r": 4, "decomposition_method": "qr"}, (*LINEAR, *CONV1D)),
    "deft-para": Type("DeftConfig", {"r": 4, "para": True}, (*LINEAR, *CONV1D), "shapes"),
    "supertuning": Type("SupertuningConfig", {"sparsity": 0.9}, LINEAR, "shapes"),
    "supertuning-hybrid": Type("SupertuningConfig", {"sparsity": 0.9, "r": 3, "lora_alpha": 5}, LINEAR),
}  # fmt: skip


@pytest.mark.parametrize("name", TYPES)
def test_the_update_is_what_peft_merges(name: str, oracle: Callable[..., Any]) -> None:
    kind = TYPES[name]
    for layers in kind.models:
        made = oracle(kind.config, layers, **kind.fields)
        told, true = made.read_changes(), made.changes()
        assert set(told) == set(true)
        for parameter, d in true.items():
            largest = max(np.abs(d).max(), np.abs(made.base[parameter]).max() / 8)
            assert np.abs(told[parameter] - d).max() <= TOLERANCE * largest, parameter


@pytest.mark.parametrize("name", TYPES)
def test_the_base_is_asked_for_only_where_it_is_needed(name: str, oracle: Callable[..., Any]) -> None:
    kind = TYPES[name]
    made = oracle(kind.config, kind.models[0], **kind.fields)
    if kind.needs == "shapes":
        with pytest.raises(NeedsBaseError, match="base"):
            made.read(base=False)
        return
    alone, given = made.read(base=False), made.read()
    if kind.needs == "rows":  # only the base says how many there are
        return
    for parameter, u in given.items():
        w = made.base[parameter].astype(np.float64)
        flat = w.reshape(alone[parameter].shape)  # a kernel that the file does not tell lies in the columns
        assert np.array_equal(u.apply(w).reshape(flat.shape), alone[parameter].apply(flat)), parameter


@pytest.mark.parametrize("name", TYPES)
def test_peft_refuses_the_other_layers(name: str, oracle: Callable[..., Any]) -> None:
    kind = TYPES[name]
    for layer in LAYERS:
        if layer not in kind.layers:
            assert _is_refused(lambda layer=layer: oracle(kind.config, [layer], **kind.fields).changes()), layer


def _is_refused(changes: Callable[[], Any]) -> bool:
    try:
        return not changes()  # some types pass over a layer in silence
    except Exception:  # whatever PEFT raises
        return True


@pytest.mark.parametrize("name", TYPES)
def test_unknown_tensors_are_refused_by_name(name: str, oracle: Callable[..., Any]) -> None:
    from safetensors.numpy import load_file, save_file

    kind = TYPES[name]
    made = oracle(kind.config, kind.layers[:1], **kind.fields)
    weights = made.folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "base_model.model.odd.tensor": np.zeros(3, np.float32)}, weights)
    with pytest.raises(LoratoolsError, match=r"odd\.tensor"):
        made.read()


@pytest.mark.parametrize("name", TYPES)
def test_a_missing_tensor_is_named(name: str, oracle: Callable[..., Any]) -> None:
    from safetensors.numpy import load_file, save_file

    kind = TYPES[name]
    made = oracle(kind.config, kind.layers[:1], **kind.fields)
    weights = made.folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    for key in tensors:
        if key.endswith(kind.may):
            continue
        save_file({k: t for k, t in tensors.items() if k != key}, weights)
        with pytest.raises(LoratoolsError, match=key.rpartition(".")[2]):
            made.read()
