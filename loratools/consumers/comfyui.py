"""ComfyUI."""

from __future__ import annotations

from loratools.consumers import image_reader as reads
from loratools.consumers.base import (
    CONSUMERS,
    FAILS,
    IDLE,
    MERGE,
    NOTE,
    PARTLY,
    STRENGTH,
    Profile,
    Recipe,
    Rule,
    format_of,
)
from loratools.consumers.health import HEALTH

SOURCE = "ComfyUI, comfy/lora.py, comfy/weight_adapter"

RULES = (
    Rule("dora-vector", PARTLY, reads.peft_magnitudes, "lora_magnitude_vector is not read", f"{SOURCE}; ComfyUI#3494"),
    Rule("factor-bias", PARTLY, reads.factor_biases, "lora_B.bias is not read", SOURCE, MERGE),
    Rule(
        "half-pairs",
        PARTLY,
        reads.halves,
        "a pair is taken whole or not at all",
        SOURCE,
        "save the file again, with both factors",
    ),
    Rule(
        "dora-flat",
        FAILS,
        reads.flat_magnitudes,
        "a dora_scale of one axis broadcasts along the wrong one",
        "Comfy-Org/ComfyUI#12938",
    ),
    Rule(
        "metadata-scale",
        STRENGTH,
        reads.scaled_by_metadata,
        "scale is alpha / rank of alpha tensors, else 1; diffusers' metadata are not read",
        SOURCE,
        formats=("diffusers",),
    ),
    Rule(
        "dora-norm",
        STRENGTH,
        reads.magnitudes,
        "the magnitude is divided by the norm of W instead of W + D",
        "Comfy-Org/ComfyUI#15458",
        "loratools check {path} --for {consumer} --base BASE --fix -o OUT",
    ),
    Rule("alpha-zero", NOTE, reads.zero_alphas, "an alpha of 0 is scale 0 here and scale 1 to sd-scripts", SOURCE),
)

CONSUMERS.add("comfyui")(
    Profile(
        name="comfyui",
        title="ComfyUI",
        version="files of 2026",
        source=SOURCE,
        ran=False,
        reads=("comfy", "kohya", "lycoris", "diffusers", "xlabs"),
        rules=(*RULES, *HEALTH),
        recipe=Recipe("comfy", kinds=("lowrank", "tucker", "hadamard", "kronecker", "dense", "replace")),
        foreign=(
            Rule(
                "format",
                IDLE,
                format_of,
                "keys of no known spelling are logged as not loaded",
                f"{SOURCE}; ComfyUI#4347",
            ),
        ),
    )
)
