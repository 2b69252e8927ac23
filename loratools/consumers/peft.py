"""PEFT itself, on transformers models."""

from __future__ import annotations

import re
from collections.abc import Iterable

from loratools.consumers import peft_reader as reads
from loratools.consumers.base import CONSUMERS, FAILS, IDLE, PARTLY, UNSURE, Evidence, Profile, Recipe, Rule, found
from loratools.consumers.health import HEALTH
from loratools.consumers.placement import both_trees, drift
from loratools.consumers.subject import Subject
from loratools.errors import LoratoolsError
from loratools.formats.peft.config import listed, settings
from loratools.formats.peft.keys import PREFIX
from loratools.formats.peft.patterns import resolver

SOURCE = "PEFT 0.21.2: peft_model.py, utils/save_and_load.py, tuners/lora (run)"
HEADS = ("classifier", "score", "qa_outputs")
DEFAULT_RANK = DEFAULT_ALPHA = 8
SHARED = tuple(f"base_model.{of}_" for of in ("vera", "pvera", "randlora", "vblora", "unilora", "tinylora"))
"""Tensors of a whole model, not of a module."""
TYPES = (
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "LORA", "ADALORA", "ADAMSS", "BOFT",
    "ADAPTION_PROMPT", "IA3", "BEFT", "LILY", "LOHA", "LOKR", "OFT", "POLY", "LN_TUNING", "VERA", "FROD", "PVERA",
    "FOURIERFT", "GLORA", "XLORA", "HRA", "VBLORA", "UNILORA", "CPT", "MISS", "RANDLORA", "ROAD",
    "TRAINABLE_TOKENS", "HIRA", "SHIRA", "C3A", "WAVEFT", "OSF", "DELORA", "GRALORA", "CARTRIDGE", "TINYLORA",
    "PSOFT", "PEANUT", "SHADOW", "SUPERTUNING", "DEFT",
)  # fmt: skip


def _no_type(subject: Subject) -> Evidence | None:
    said = subject.config.get("peft_type")
    return None if str(said).upper() in TYPES else Evidence("no peft_type" if said is None else f"peft_type is {said}")


def _other_ranks(subject: Subject) -> Evidence | None:
    """Tensors of another rank than the config resolves for their module."""
    try:
        said = settings({"r": DEFAULT_RANK, "lora_alpha": DEFAULT_ALPHA, **_given(subject)})
    except LoratoolsError:
        return None
    rank_of = said.rank_of()
    ranks = {
        parsed.path: subject.tensors[key].shape[0]
        for key, parsed in subject.keys.items()
        if parsed.leaf == "lora_A.weight" and not subject.config.get("target_parameters")
    }
    wrong = [f"{path} has rank {rank}, config {rank_of(path)}" for path, rank in ranks.items() if rank_of(path) != rank]
    return found(wrong, len(ranks))


def _given(subject: Subject) -> dict[str, object]:
    return {k: v for k, v in subject.config.items() if v is not None}


def targeted(config_targets: object, path: str) -> bool:
    """Return whether ``target_modules`` names a module path, as PEFT matches it."""
    if isinstance(config_targets, str):
        return config_targets == "all-linear" or _compiled(config_targets).fullmatch(path) is not None
    names = config_targets if isinstance(config_targets, list | tuple) else ()
    return any(path == name or path.endswith(f".{name}") for name in names)


def _compiled(pattern: str) -> re.Pattern[str]:
    """Compile ``target_modules`` under the same guard as the other patterns of the config."""
    resolver({pattern: 0}, 0, "target_modules")
    return re.compile(pattern)


def _untargeted(subject: Subject) -> Evidence | None:
    said = subject.config.get("target_modules")
    if said is None:
        return None if subject.config.get("target_parameters") else Evidence("target_modules is missing")
    missed = [path for path in subject.factors if not targeted(said, path) and not _by_parameter(subject, path)]
    return found(missed, len(subject.factors))


def _by_parameter(subject: Subject, path: str) -> bool:
    return any(f"{path}.".find(str(n).rpartition(".")[0]) >= 0 for n in listed(subject.config, "target_parameters"))


def _unprefixed(subject: Subject) -> Evidence | None:
    bare = reads.unprefixed(subject)
    return bare if bare is not None and len(bare.modules) == len(subject.tensors) else None


def _some_unprefixed(subject: Subject) -> Evidence | None:
    keys = [k for k in subject.tensors if not k.startswith((PREFIX, *SHARED))]
    return found(keys, len(subject.tensors)) if len(keys) < len(subject.tensors) else None


def _saved_missing(subject: Subject) -> Evidence | None:
    """Modules of modules_to_save without tensors, if the model has them; PEFT lists heads that most models lack."""
    names = [str(n) for n in listed(subject.config, "modules_to_save")]
    missing = [n for n in names if not _within(n, subject.tensors)]
    if subject.base is not None:
        missing = [n for n in missing if _within(n, subject.base)]
    elif len(missing) < len(names):
        missing = [n for n in missing if n not in HEADS]
    return found(missing)


def _within(module: str, names: Iterable[str]) -> bool:
    return any(f".{module}." in f".{name}" for name in names)


def _dora_off(subject: Subject) -> Evidence | None:
    return None if subject.config.get("use_dora") else reads.dora(subject)


def _orphans(subject: Subject) -> Evidence | None:
    """Copies of a base layer whose module has no factors: PEFT has no such layer to put them into."""
    adapted = {parsed.path for parsed in subject.keys.values() if parsed.leaf}
    whole = {
        key: parsed.path for key, parsed in subject.keys.items() if ".base_layer." in parsed.path and not parsed.leaf
    }
    return found([key for key, path in whole.items() if path.partition(".base_layer.")[0] not in adapted])


RULES = (
    Rule("type", FAILS, _no_type, "PEFT looks the type up before it reads a tensor", SOURCE),
    Rule("rank-mismatch", FAILS, _other_ranks, "PEFT makes factors of the config's rank and refuses others", SOURCE),
    Rule(
        "saved-missing", FAILS, _saved_missing, "a module in modules_to_save must have its tensors in the file", SOURCE
    ),
    Rule("no-prefix", IDLE, _unprefixed, "keys without base_model.model. match nothing", SOURCE),
    Rule("no-prefix-some", PARTLY, _some_unprefixed, "keys without base_model.model. match nothing", SOURCE),
    Rule(
        "not-targeted", PARTLY, _untargeted, "PEFT adapts what target_modules names; other tensors are skipped", SOURCE
    ),
    Rule(
        "half-pairs",
        PARTLY,
        reads.halves,
        "a factor that is missing stays at its initial value, a zero product",
        SOURCE,
        "save the adapter again, with both factors",
    ),
    Rule("dora-off", PARTLY, _dora_off, "without use_dora the magnitudes are skipped", SOURCE),
    Rule("orphan-base-layer", PARTLY, _orphans, "there is no adapted layer whose base could be replaced", SOURCE),
    Rule(
        "alpha-unsaid",
        UNSURE,
        lambda s: None if reads.not_lora(s) else reads.lacks("lora_alpha")(s),
        f"PEFT takes {DEFAULT_ALPHA} where lora_alpha is missing",
        SOURCE,
        "write the training's lora_alpha into adapter_config.json",
    ),
)

CONSUMERS.add("peft")(
    Profile(
        name="peft",
        title="PEFT",
        version="0.21.2, with transformers 5.23",
        source=SOURCE,
        ran=True,
        reads=("peft",),
        rules=(*RULES, *drift(both_trees, source=SOURCE), *HEALTH),
        recipe=Recipe("peft", kinds=("lowrank", "dora", "dense", "replace", "replace_rows", "rebased", "stack")),
    )
)
