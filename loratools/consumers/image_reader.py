"""Predicates over image LoRA files: kohya's, ComfyUI's and diffusers' spellings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from loratools.consumers.base import Evidence, found
from loratools.consumers.subject import Subject
from loratools.formats.spaces import COMPONENTS, component_of
from loratools.io.base import Base
from loratools.linalg.namespace import to_numpy, up

KOHYA = ("lora_te_", "lora_unet_", "lora_te1_", "lora_te2_")
_DOWN = ("lora_down.weight", "lora_A.weight", "lora.down.weight", "lora_linear_layer.down.weight")
_UP = ("lora_up.weight", "lora_B.weight", "lora.up.weight", "lora_linear_layer.up.weight")
_CLOSE = 1e-6


def magnitudes(subject: Subject) -> Evidence | None:
    """dora_scale tensors."""
    return found([key for key in subject.tensors if "dora_scale" in key])


def peft_magnitudes(subject: Subject) -> Evidence | None:
    """lora_magnitude_vector tensors."""
    return found([key for key in subject.tensors if "lora_magnitude_vector" in key])


def flat_magnitudes(subject: Subject) -> Evidence | None:
    """dora_scale tensors of one axis."""
    return found([key for key, t in subject.tensors.items() if "dora_scale" in key and len(t.shape) < 2])


def factor_biases(subject: Subject) -> Evidence | None:
    """Biases of lora_B."""
    return found([key for key in subject.tensors if key.endswith("lora_B.bias")])


def halves(subject: Subject) -> Evidence | None:
    """Modules with one factor of two."""
    seen: defaultdict[str, set[int]] = defaultdict(set)
    for key in subject.tensors:
        for side, leaves in enumerate((_DOWN, _UP)):
            for leaf in leaves:
                if key.endswith(f".{leaf}"):
                    seen[key.removesuffix(f".{leaf}")].add(side)
    return found([stem for stem, sides in seen.items() if len(sides) == 1], len(seen))


def zero_alphas(subject: Subject) -> Evidence | None:
    """Alphas stored as 0."""
    scalars = [key for key, t in subject.tensors.items() if key.endswith(".alpha") and t.nbytes <= 8]
    return found([key for key in scalars if float(up(to_numpy(subject.tensors[key])).reshape(-1)[0]) == 0])


def scaled_by_metadata(subject: Subject) -> Evidence | None:
    """Modules whose scale is only in the metadata, and is not 1."""
    scales = {path: u.scale for path, u in subject.factors.items()}
    return found([f"{path} (x{s:g})" for path, s in scales.items() if abs(s - 1) > _CLOSE], len(scales))


def mixed_ranks(subject: Subject) -> Evidence | None:
    """Unequal ranks without a word about alphas."""
    ranks = sorted({u.rank for u in subject.factors.values()})
    said = "lora_adapter_metadata" in subject.bundle.metadata or any(k.endswith(".alpha") for k in subject.tensors)
    return Evidence(f"ranks {', '.join(map(str, ranks))} and no alphas") if len(ranks) > 1 and not said else None


def bare_paths(subject: Subject) -> Evidence | None:
    """Module paths without the name of a component."""
    return found([key for key in subject.tensors if key.partition(".")[0] not in COMPONENTS], len(subject.tensors))


def component_tree(base: Base) -> Mapping[str, tuple[int, ...]]:
    """Return a diffusers model's names under the component that they belong to."""
    homes = {name: component_of(name) for name in base}
    return {f"{home}.{name}" if home else name: base.shapes[name] for name, home in homes.items()}
