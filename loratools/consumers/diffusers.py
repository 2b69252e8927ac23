"""diffusers: load_lora_weights of its pipelines."""

from __future__ import annotations

import json

from loratools.consumers import image_reader as reads
from loratools.consumers.base import (
    CONSUMERS,
    FAILS,
    IDLE,
    MERGE,
    NOTE,
    PARTLY,
    Evidence,
    Profile,
    Recipe,
    Rule,
    format_of,
    found,
)
from loratools.consumers.health import HEALTH
from loratools.consumers.placement import drift
from loratools.consumers.subject import Subject
from loratools.formats.algebra import BEYOND_LORA

SOURCE = "diffusers 0.42.1: loaders/lora_pipeline.py, loaders/peft.py, utils/peft_utils.py (run)"
METADATA = "lora_adapter_metadata"
_UNET = ("input_blocks.", "output_blocks.", "middle_block.", "down_blocks.", "up_blocks.", "mid_block.")


def _kohya(subject: Subject) -> bool:
    return all(key.startswith(reads.KOHYA) for key in subject.tensors)


def _stray(subject: Subject) -> Evidence | None:
    """Keys without "lora": any of them refuses the file, unless all keys are kohya's."""
    return (
        None if _kohya(subject) else found([key for key in subject.tensors if "lora" not in key], len(subject.tensors))
    )


def _foreign(subject: Subject) -> Evidence | None:
    return format_of(subject) if _kohya(subject) or _stray(subject) else None


def _silent(subject: Subject) -> Evidence | None:
    return None if _foreign(subject) else format_of(subject)


def _other_heads(subject: Subject) -> Evidence | None:
    return found([key for key in subject.tensors if not key.startswith(reads.KOHYA)], len(subject.tensors))


def _beyond_lora(subject: Subject) -> Evidence | None:
    tails = tuple(f".{leaf}" for leaf in BEYOND_LORA)
    return found([key for key in subject.tensors if key.endswith(tails)])


def _authors_unet(subject: Subject) -> Evidence | None:
    bare = {key: key.removeprefix("diffusion_model.") for key in subject.tensors}
    return found([key for key, rest in bare.items() if key != rest and rest.startswith(_UNET)], len(bare))


def _metadata_ranks(subject: Subject) -> Evidence | None:
    """Ranks in the metadata that are not the tensors'."""
    from loratools.formats.peft.config import settings

    text = subject.bundle.metadata.get(METADATA)
    if text is None or subject.adapter is None:
        return None
    table, wrong = json.loads(text), []
    for path, u in subject.factors.items():
        head, _, rest = path.partition(".")
        config = {key.partition(".")[2]: v for key, v in table.items() if key.startswith(f"{head}.")}
        config = config or {key: v for key, v in table.items() if "." not in key}
        rank = settings(config).rank_of()(rest) if config else u.rank
        wrong += [f"{path} has rank {u.rank}, metadata {rank}"] if rank != u.rank else []
    return found(wrong, len(subject.factors))


RULES = (
    Rule(
        "bare-paths",
        IDLE,
        reads.bare_paths,
        "a pipeline takes the keys under unet., transformer., text_encoder. alone",
        SOURCE,
        formats=("diffusers",),
    ),
    Rule(
        "unet-names",
        IDLE,
        _authors_unet,
        "UNet pipelines take kohya's names or their own, not the authors' dotted ones",
        SOURCE,
        formats=("comfy",),
    ),
    Rule(
        "stray-keys",
        FAILS,
        _stray,
        "a key without the letters lora makes the file invalid",
        SOURCE,
        formats=("diffusers",),
    ),
    Rule(
        "kohya-heads",
        FAILS,
        _other_heads,
        "a file is kohya's only if every key begins with lora_unet_ or lora_te_",
        SOURCE,
        formats=("kohya",),
    ),
    Rule(
        "beyond-lora",
        FAILS,
        _beyond_lora,
        "LoHa, LoKr, differences and Tucker cores have not been correctly renamed",
        f"{SOURCE}; huggingface/peft#1065",
        formats=("kohya", "comfy"),
    ),
    Rule(
        "metadata-ranks",
        FAILS,
        _metadata_ranks,
        "layers are made at the metadata's ranks, and others refused",
        SOURCE,
        formats=("diffusers",),
    ),
    Rule(
        "half-pairs",
        PARTLY,
        reads.halves,
        "a factor that is missing stays at its initial value, a zero product",
        SOURCE,
        "save the file again, with both factors",
    ),
    Rule("dora", PARTLY, reads.magnitudes, "dora_scale is filtered out with a warning", SOURCE, MERGE),
    Rule(
        "mixed-ranks",
        NOTE,
        reads.mixed_ranks,
        "versions before August 2026 take the alpha of the first module for all",
        "huggingface/diffusers#14409",
    ),
    Rule(
        "metadata",
        NOTE,
        reads.scaled_by_metadata,
        "versions before 0.34 do not read scales from the metadata",
        SOURCE,
        "loratools convert {path} --to diffusers --set bake=true -o OUT",
        formats=("diffusers",),
    ),
)
FOREIGN = (
    Rule("format", FAILS, _foreign, "such keys make the file invalid", SOURCE),
    Rule(
        "format-ignored",
        IDLE,
        _silent,
        "keys that belong to no component are skipped without an error",
        f"{SOURCE}; huggingface/diffusers#9291",
    ),
)

CONSUMERS.add("diffusers")(
    Profile(
        name="diffusers",
        title="diffusers",
        version="0.42.1, Stable Diffusion pipelines",
        source=SOURCE,
        ran=True,
        reads=("diffusers", "kohya", "comfy", "xlabs"),
        rules=(
            *RULES,
            *drift(reads.component_tree, none=FAILS, source=SOURCE, formats=("diffusers", "kohya")),
            *HEALTH,
        ),
        recipe=Recipe("diffusers", kinds=("lowrank", "dora", "dense")),
        foreign=FOREIGN,
    )
)
