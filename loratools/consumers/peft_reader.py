"""Predicates over PEFT directories, for the programs that read them more or less completely."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

from loratools.consumers.base import Evidence, Predicate, found, some
from loratools.consumers.subject import Subject
from loratools.errors import LoratoolsError
from loratools.formats.peft.config import altered_base, listed, settings
from loratools.kinds.lowrank import LowRank

PREFIX = "base_model.model."
FACTORS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
Reader = Callable[[Mapping[str, object], LowRank], float]  # the scale that a program gives a module
CLOSE = 1e-6


def alpha_over_r(config: Mapping[str, object], u: LowRank) -> float:
    """Return lora_alpha / r of the config, for all modules and without rsLoRA."""
    said = settings(config)
    return said.lora_alpha / said.r


def alpha_over_r_or_root(config: Mapping[str, object], u: LowRank) -> float:
    """Return the config's scale for all modules, rsLoRA included."""
    said = settings(config)
    return said.scale(said.lora_alpha, said.r)


def alpha_over_rank(config: Mapping[str, object], u: LowRank) -> float:
    """Return lora_alpha / rank of the tensor: GGUF's rule."""
    return settings(config).lora_alpha / u.rank


def misread(reader: Reader) -> Predicate:
    """Return the predicate for modules to which the program gives another scale than the file means."""

    def find(subject: Subject) -> Evidence | None:
        try:
            ratios = {path: _ratio(reader(subject.config, u), u.scale) for path, u in subject.factors.items()}
        except LoratoolsError:
            return None  # a config without r or lora_alpha: its own rule says so
        wrong = {path: ratio for path, ratio in ratios.items() if abs(ratio - 1) > CLOSE}
        if not wrong:
            return None
        spread = ", ".join(f"x{r:.4g}" for r in sorted(set(wrong.values()))[:4])
        return Evidence(f"{len(wrong)} of {len(ratios)} modules would act at {spread} of their strength", tuple(wrong))

    return find


def _ratio(read: float, meant: float) -> float:
    if meant == 0:
        return 1.0 if read == 0 else math.inf
    return read / meant


def lacks(*fields: str) -> Predicate:
    """Return the predicate for config fields that are missing."""
    return lambda s: found([f for f in fields if s.config.get(f) is None])


def not_lora(subject: Subject) -> Evidence | None:
    """A peft_type other than LORA."""
    said = str(subject.config.get("peft_type", "")).upper()
    return None if said in ("", "LORA") else Evidence(f"peft_type is {said}")


def dora(subject: Subject) -> Evidence | None:
    """use_dora, or magnitudes among the tensors."""
    keys = [key for key, parsed in subject.keys.items() if parsed.leaf.startswith("lora_magnitude_vector")]
    return some(keys) if keys else Evidence("use_dora is true") if subject.config.get("use_dora") else None


def saved_modules(subject: Subject) -> Evidence | None:
    """modules_to_save, or whole parameters of modules among the tensors."""
    keys = [k for k in _whole(subject) if not k.endswith(".bias")]
    listed_ = [str(m) for m in listed(subject.config, "modules_to_save")]
    return found(keys) or (Evidence(f"modules_to_save is {', '.join(listed_)}") if listed_ else None)


def biases(subject: Subject) -> Evidence | None:
    """Biases of the base, or of lora_B, in the file or by its config."""
    said = subject.config.get("bias", "none")
    return bias_tensors(subject) or (Evidence(f"bias is {said}") if said not in ("none", None) else None)


def bias_tensors(subject: Subject) -> Evidence | None:
    """Biases of the base, or of lora_B, in the file."""
    return found([k for k in subject.tensors if k.endswith(".bias")])


def _whole(subject: Subject) -> list[str]:
    return [k for k, parsed in subject.keys.items() if not parsed.leaf and ".base_layer." not in k]


def tokens(subject: Subject) -> Evidence | None:
    """Trained token rows."""
    return found([k for k, parsed in subject.keys.items() if parsed.leaf.startswith("token_adapter")])


def adapter_name(subject: Subject) -> Evidence | None:
    """An adapter name left in the keys: lora_A.default.weight."""
    return found([key for key, parsed in subject.keys.items() if parsed.adapter])


def strange_leaves(*allowed: str) -> Predicate:
    """Return the predicate for factor tensors outside ``allowed`` leaves (other rules judge magnitudes and biases)."""
    others = ("lora_magnitude_vector", "lora_B.bias", "token_adapter")

    def find(subject: Subject) -> Evidence | None:
        leaves = {k: p.leaf for k, p in subject.keys.items() if p.leaf and not p.leaf.startswith(others)}
        return found([key for key, leaf in leaves.items() if leaf not in allowed])

    return find


def unprefixed(subject: Subject) -> Evidence | None:
    """Keys without base_model.model. before the module path."""
    return found([k for k in subject.tensors if not k.startswith(PREFIX)], len(subject.tensors))


def halves(subject: Subject) -> Evidence | None:
    """Modules with one factor of two."""
    seen: defaultdict[str, set[str]] = defaultdict(set)
    for parsed in subject.keys.values():
        if parsed.leaf in FACTORS:
            seen[parsed.path].add(parsed.leaf.partition(".")[0][-1])
    return found([path for path, letters in seen.items() if letters != {"A", "B"}], len(seen))


def not_multiplying(subject: Subject) -> Evidence | None:
    """Pairs whose factors do not multiply: grouped (MergedLinear) files of early PEFT."""
    if subject.config.get("target_parameters"):
        return None
    wrong = []
    for key, parsed in subject.keys.items():
        b = subject.tensors.get(key.replace("lora_A", "lora_B"))
        if parsed.leaf == "lora_A.weight" and b is not None and len(b.shape) > 1:
            a = subject.tensors[key]
            wrong += [f"{parsed.path}: A {a.shape}, B {b.shape}"] if a.shape[0] != b.shape[1] else []
    return found(wrong)


def not_linear(subject: Subject) -> Evidence | None:
    """Factors of convolutions."""
    return found([k for k, p in subject.keys.items() if p.leaf in FACTORS and len(subject.tensors[k].shape) > 2])


def altered(subject: Subject) -> Evidence | None:
    """Factors that are relative to a base that training changed (PiSSA and kin)."""
    init = altered_base(subject.config)
    return None if init is None else Evidence(f"init_lora_weights is {init}")


def stacked_experts(subject: Subject) -> Evidence | None:
    """target_parameters: expert stacks under nested keys."""
    names = listed(subject.config, "target_parameters")
    return found([str(n) for n in names])


def experts_with_rslora(subject: Subject) -> Evidence | None:
    """rsLoRA on modules of experts."""
    if not subject.config.get("use_rslora"):
        return None
    return found([path for path in subject.modules if ".experts" in path])


def pickled(subject: Subject) -> Evidence | None:
    """Weights in a torch pickle."""
    return Evidence(str(subject.bundle.path)) if subject.bundle.container == "pickle" else None


def last_names(names: Iterable[str]) -> Predicate:
    """Return the predicate for modules whose last name is not among ``names``."""
    known = frozenset(names)
    return lambda s: found([p for p in s.modules if p.rpartition(".")[2] not in known], len(s.modules))


def gaps(subject: Subject) -> Evidence | None:
    """Module types that some layer lacks; the number of layers is the base's, else the largest seen."""
    layers: defaultdict[str, set[int]] = defaultdict(set)
    for path in subject.modules:
        if match := re.search(r"\.(\d+)\.(.+)$", path):
            layers[match[2]].add(int(match[1]))
    said = 0 if subject.base is None else subject.base.config.get("num_hidden_layers", 0)
    count = max(int(said or 0), *(max(seen) + 1 for seen in layers.values())) if layers else 0
    lacking = [f"{kind} ({len(seen)} of {count} layers)" for kind, seen in layers.items() if len(seen) < count]
    return found(lacking, len(layers))


def mixed_ranks_of_a_type(subject: Subject) -> Evidence | None:
    """Module types whose rank differs from layer to layer."""
    ranks: defaultdict[str, set[int]] = defaultdict(set)
    for path, u in subject.factors.items():
        ranks[path.rpartition(".")[2]].add(u.rank)
    return found([f"{kind} has ranks {sorted(seen)}" for kind, seen in ranks.items() if len(seen) > 1])


def largest_rank(subject: Subject) -> int:
    """Return the largest rank of the tensors and of the config."""
    said = subject.config.get("r")
    return max([u.rank for u in subject.factors.values()] + ([said] if isinstance(said, int) else [0]))


def above(limit: int | None = None) -> Predicate:
    """Return the predicate for a rank above the program's own limit, or the one that its server was started with."""

    def find(subject: Subject) -> Evidence | None:
        bound = min(n for n in (limit, subject.limit, 1 << 30) if n)
        rank = largest_rank(subject)
        return Evidence(f"rank {rank}, at most {bound}") if rank > bound else None

    return find
