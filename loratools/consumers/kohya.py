"""kohya's sd-scripts, and the programs that read as it does (networks.lora)."""

from __future__ import annotations

from loratools.consumers import image_reader as reads
from loratools.consumers.base import (
    CONSUMERS,
    IDLE,
    MERGE,
    NOTE,
    PARTLY,
    UNSURE,
    Evidence,
    Profile,
    Recipe,
    Rule,
    format_of,
    found,
)
from loratools.consumers.health import HEALTH
from loratools.consumers.subject import Subject
from loratools.formats.algebra import BEYOND_LORA

SOURCE = "sd-scripts 0.9, networks/lora.py"
HEADS = (*reads.KOHYA, "lora_te3_")


def _other_heads(subject: Subject) -> Evidence | None:
    stems = dict.fromkeys(key.partition(".")[0] for key in subject.tensors if not key.startswith("bundle_emb"))
    return found([stem for stem in stems if not stem.startswith(HEADS)], len(stems))


def _beyond_lora(subject: Subject) -> Evidence | None:
    tails = tuple(f".{leaf}" for leaf in BEYOND_LORA)
    return found([key for key in subject.tensors if key.endswith(tails)])


RULES = (
    Rule("heads", PARTLY, _other_heads, f"modules are looked up under {', '.join(HEADS)}", SOURCE),
    Rule(
        "beyond-lora",
        UNSURE,
        _beyond_lora,
        "LoHa, LoKr and differences need --network_module lycoris.kohya",
        SOURCE,
        "loratools convert {path} --to kohya -o OUT",
    ),
    Rule("dora", PARTLY, reads.magnitudes, "networks.lora has no magnitudes", SOURCE, MERGE),
    Rule(
        "half-pairs",
        PARTLY,
        reads.halves,
        "a factor that is missing stays at its initial value, a zero product",
        SOURCE,
        "save the file again, with both factors",
    ),
    Rule(
        "alpha-zero",
        NOTE,
        reads.zero_alphas,
        "an alpha of 0 is scale 1 here and scale 0 to ComfyUI and diffusers",
        SOURCE,
    ),
)

CONSUMERS.add("kohya")(
    Profile(
        name="kohya",
        title="sd-scripts",
        version="0.9 (files of 2025-2026)",
        source=SOURCE,
        ran=False,
        reads=("kohya", "lycoris"),
        rules=(*RULES, *HEALTH),
        recipe=Recipe("kohya", kinds=("lowrank",)),
        foreign=(Rule("format", IDLE, format_of, "keys that name none of its modules are skipped", SOURCE),),
    )
)
