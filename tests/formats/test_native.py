"""Native files: what is broken in a description is named, by parameter and field; the format claims its own alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratools as lt
from loratools.core.adapter import Adapter, Meta
from loratools.core.update import KINDS
from loratools.errors import FormatError, LoratoolsError
from loratools.formats.base import FORMATS
from loratools.io.bundle import Bundle, from_memory
from loratools.io.write import write_safetensors
from loratools.linalg.namespace import to_numpy

NAME = "layer.weight"


def bundle(kind: str = "lowrank", change: Callable[[Any], None] = lambda said: None) -> Bundle:
    """A native file in memory, with its description changed."""
    made = FORMATS["native"].encode(Adapter({NAME: KINDS[kind].example(1)}, Meta(history=("made",))))
    said = json.loads(made.metadata["loratools"])
    change(said)
    tensors = {k: to_numpy(t) for k, t in made.tensors.items()}
    return from_memory(tensors, None, {"loratools": json.dumps(said)})


def fields(said: Any) -> Any:
    return said["updates"][NAME]["fields"]


def put(key: str, value: Any) -> Callable[[Any], None]:
    return lambda said: fields(said).__setitem__(key, value)


def top(key: str, value: Any) -> Callable[[Any], None]:
    return lambda said: said.__setitem__(key, value)


def entry(key: str, value: Any) -> Callable[[Any], None]:
    return lambda said: said["updates"][NAME].__setitem__(key, value)


def nested(depth: int) -> Any:
    one: Any = {"kind": "sum", "fields": {"parts": []}}
    for _ in range(depth):
        one = {"kind": "sum", "fields": {"parts": [one]}}
    return one


TENSOR = {"tensor": f"{NAME}.b"}
REPLACEMENT = {"kind": "replace", "fields": {"value": {"tensor": f"{NAME}.magnitude"}}}
Case = tuple[str, Callable[[Any], None], str]  # kind, what is broken, where the error says that it is
IN_UPDATES: dict[str, Case] = {
    "kind missing": ("lowrank", entry("kind", None), "kind"),
    "kind a list": ("lowrank", entry("kind", []), "kind"),
    "fields a list": ("lowrank", entry("fields", [1]), "fields"),
    "fields missing": ("lowrank", entry("fields", None), "fields"),
    "a field missing": ("lowrank", lambda said: fields(said).pop("b"), "fields"),
    "a field too many": ("lowrank", put("c", 1), "fields"),
    "a number for a tensor": ("lowrank", put("b", 5), "b"),
    "null for a tensor": ("lowrank", put("b", None), "b"),
    "a list for a tensor": ("lowrank", put("b", [TENSOR]), "b"),
    "an update for a tensor": ("lowrank", put("b", {"kind": "lowrank", "fields": {}}), "b"),
    "a tensor that is not there": ("lowrank", put("b", {"tensor": "x"}), "b"),
    "a tensor's key a list": ("lowrank", put("b", {"tensor": []}), "b"),
    "scale a string": ("lowrank", put("scale", "2"), "scale"),
    "scale null": ("lowrank", put("scale", None), "scale"),
    "scale a tensor": ("lowrank", put("scale", TENSOR), "scale"),
    "scale true": ("lowrank", put("scale", True), "scale"),
    "scale infinite": ("lowrank", put("scale", float("inf")), "scale"),
    "scale not a number": ("lowrank", put("scale", float("nan")), "scale"),
    "scale huge": ("lowrank", put("scale", 10**400), "scale"),
    "shape a number": ("lowrank", put("shape", 5), "shape"),
    "shape with zero": ("lowrank", put("shape", [5, 0]), "shape[1]"),
    "shape negative": ("lowrank", put("shape", [-5, -7]), "shape[0]"),
    "shape of fractions": ("lowrank", put("shape", [5.0, 7.0]), "shape[0]"),
    "shape true": ("lowrank", put("shape", [True, 35]), "shape[0]"),
    "parts of numbers": ("sum", put("parts", [1]), "parts[0]"),
    "parts a number": ("sum", put("parts", 1), "parts"),
    "axis out of range": ("dora", put("axis", 9), "dora"),
    "axis negative": ("dora", put("axis", -1), "axis"),
    "axis a fraction": ("dora", put("axis", 0.5), "axis"),
    "direction a tensor": ("dora", put("direction", TENSOR), "direction"),
    "direction a replacement": (
        "dora",
        put("direction", REPLACEMENT),
        "direction",
    ),
    "index of fractions": ("replace_rows", put("index", [0.5, 1, 2]), "index[0]"),
    "kinds nested for ever": ("sum", put("parts", [nested(40)]), "parts[0]"),
}
IN_FILES: dict[str, Case] = {
    "updates a number": ("lowrank", top("updates", 5), "updates"),
    "updates a list": ("lowrank", top("updates", [1]), "updates"),
    "an update a list": ("lowrank", top("updates", {NAME: []}), "updates"),
    "history a number": ("lowrank", top("history", 5), "history"),
    "history of numbers": ("lowrank", top("history", [5]), "history[0]"),
    "leftover a number": ("lowrank", top("leftover", 5), "leftover"),
    "leftover of lists": ("lowrank", top("leftover", [[]]), "leftover[0]"),
    "layout a list": ("lowrank", top("layout", []), "layout"),
    "layout of numbers": ("lowrank", top("layout", {NAME: 5}), "layout"),
    "config a list": ("lowrank", top("config", [1]), "config"),
    "namespace a list": ("lowrank", top("namespace", []), "namespace"),
    "base a number": ("lowrank", top("base", 5), "base"),
    "origin a number": ("lowrank", top("origin", 5), "origin"),
    "scaled a number": ("lowrank", top("scaled", 5), "scaled"),
    "unmergeable a list": ("lowrank", top("unmergeable", []), "unmergeable"),
    "absorbed a list": ("lowrank", top("absorbed", [1]), "absorbed"),
    "absorbed of nothing": ("lowrank", top("absorbed", {NAME: {"x": "y"}}), "absorbed.x"),
}
BROKEN = IN_UPDATES | IN_FILES


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_named(case: str) -> None:
    kind, change, where = BROKEN[case]
    with pytest.raises(FormatError) as caught:
        FORMATS["native"].decode(bundle(kind, change))
    assert f"at {where}" in caught.value.what
    assert case in IN_FILES or caught.value.parameter == NAME


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (entry("kind", "unheard of"), "unknown kind"),
        (put("shape", [7, 5]), "do not fit the parameter"),
        (top("absorbed", {"other": {}}), "not described"),
        (top("format", 2), "unknown version"),
    ],
)
def test_what_does_not_fit_is_refused(change: Callable[[Any], None], match: str) -> None:
    with pytest.raises(FormatError, match=match):
        FORMATS["native"].decode(bundle("lowrank", change))


@pytest.mark.parametrize("text", ["[" * 100_000, "{", '{"updates": {}, "updates": {}}', '{"updates": "\ud800"}'])
def test_a_description_that_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(FormatError, match="description"):
        FORMATS["native"].decode(from_memory({}, None, {"loratools": text}))


def test_other_files_are_declined_by_name(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", [], [], metadata={"format": "pt"})
    with pytest.raises(FormatError, match="no native file") as caught:
        lt.load(tmp_path / "x.safetensors", format="native")
    assert caught.value.file == str(tmp_path / "x.safetensors")
    with pytest.raises(LoratoolsError):
        FORMATS["native"].decode(from_memory({}, None, {"loratools": "5"}))


@pytest.mark.parametrize("dtype", ["int8", "bool", "complex64", "int64"])
@pytest.mark.parametrize("kind", ["lowrank", "dense", "dora", "rebased", "sum"])
def test_factors_of_integers_are_refused_by_name(kind: str, dtype: str, tmp_path: Path) -> None:
    made = FORMATS["native"].encode(Adapter({NAME: KINDS[kind].example(1)}))
    last = [key for key in made.tensors if not key.endswith(".value")][-1]
    tensors = {k: to_numpy(t).astype(dtype) if k == last else to_numpy(t) for k, t in made.tensors.items()}
    file = lt.save(Adapter({NAME: KINDS["lowrank"].example(1)}), tmp_path / "x.safetensors", format="native")
    from loratools.files import decode

    with pytest.raises(FormatError, match="not of a floating dtype") as caught:
        decode(replace(from_memory(tensors, None, made.metadata), path=file))
    assert caught.value.parameter == NAME
    assert dtype in str(caught.value.got)


@pytest.mark.parametrize("kind", ["replace", "replace_rows"])
def test_whole_values_may_be_integers(kind: str) -> None:
    made = FORMATS["native"].encode(Adapter({NAME: KINDS[kind].example(1)}))
    tensors = {k: to_numpy(t).astype(np.int64) for k, t in made.tensors.items()}
    from loratools.files import decode

    assert decode(from_memory(tensors, None, made.metadata))[NAME].kind == kind


def test_a_native_file_beside_a_config_of_peft(tmp_path: Path) -> None:
    """Its own description counts, and the neighbour's config says nothing about it."""
    from loratools.kinds.lowrank import LowRank

    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 3, "lora_alpha": 99}')
    u = LowRank.example(1)
    lt.save(Adapter({NAME: u}), tmp_path / "x.safetensors", format="native")
    again = lt.load(tmp_path / "x.safetensors")
    assert again.meta.format == "native"
    assert list(again) == [NAME]
    assert again[NAME].scale == u.scale  # type: ignore[attr-defined]
    assert np.array_equal(to_numpy(again[NAME].b), u.b)  # type: ignore[attr-defined]
