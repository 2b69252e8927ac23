"""Writing LORA files: canonical keys, and a config that says every scale."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from loratools.core.adapter import Adapter
from loratools.core.lazy import Tensor, lazily, widened
from loratools.core.update import Update, shape_of
from loratools.errors import ConversionError, UsageError
from loratools.formats.metadata import carried
from loratools.formats.peft.forms import FORMS
from loratools.formats.peft.forms.form import BIAS, MAGNITUDE, Factored, Form, Layout
from loratools.formats.peft.forms.tokens import ROWS
from loratools.formats.peft.forms.wrappers import WRAPPER, place
from loratools.formats.peft.keys import PREFIX
from loratools.formats.peft.lora_config import Told, holds, written
from loratools.formats.peft.lora_sort import SAMPLER
from loratools.formats.peft.lora_targets import in_line
from loratools.formats.stored import EMBEDDINGS, is_turned
from loratools.io.bundle import Bundle
from loratools.kinds.dense import Dense
from loratools.kinds.dora import Dora
from loratools.kinds.lowrank import LowRank
from loratools.kinds.rebased import Rebased
from loratools.kinds.replace import Replace
from loratools.kinds.replace_rows import ReplaceRows
from loratools.kinds.stack import Stack
from loratools.linalg.namespace import down, dtype_name, up, working_dtype


class Slot(NamedTuple):
    """The place of one factored update: its form, module path, layout, and the paths that the config's patterns see."""

    update: Update
    factored: Factored
    form: Form
    layout: Layout
    path: str
    patterns: tuple[str, ...]

    @property
    def told(self) -> tuple[int, float]:
        """Rank and scale as the config says them."""
        height = self.factored.rank
        if self.form is FORMS["conv"] and isinstance(self.factored, Stack):
            height *= self.factored.shape[0]
        return height, self.form.file_scale(self.factored.scale)


def write(adapter: Adapter, **options: Any) -> Bundle:
    """Encode an adapter of factored updates, magnitudes, bias differences, rows of tokens and replacements.

    A config whose ranks and scales still hold is kept as it is. Raises :class:`ConversionError` for an update that LORA
    files cannot say.
    """
    if options:
        raise UsageError("the PEFT format has no such option", got=", ".join(options))
    slots = _slots(adapter)
    if not slots:
        raise ConversionError(
            "a PEFT file needs at least one low-rank update", got=f"{len(adapter)} others",
            hint="the native format holds every kind",
        )  # fmt: skip
    told = _told(slots.values())
    untouched = {n: kept.tensors for n, kept in adapter.meta.absorbed.items() if adapter.get(n) is kept.update}
    plain = _told(slot for name, slot in slots.items() if name not in untouched)
    same = len(untouched) == len(adapter.meta.absorbed) and holds(adapter, plain)
    tensors: dict[str, Tensor] = {}
    for name in adapter:
        tensors |= untouched[name] if same and name in untouched else _tensors(adapter, name, slots, told)
    tensors |= {key: t for key, t in adapter.meta.leftover.items() if same or SAMPLER not in key}
    meta = adapter.meta
    config = in_line(
        meta.config if same else written(adapter, told),
        adapter,
        {slot.patterns[0]: "path" in slot.layout for slot in slots.values() if slot.form is not FORMS["experts"]},
        [name for slot in slots.values() if slot.form is FORMS["experts"] for name in slot.patterns],
    )
    return Bundle(
        tensors=tensors,
        metadata={"format": "pt", **carried(meta, "peft")},
        config=config,
        path=None,
        container="safetensors",
        siblings=meta.siblings,
        readme=meta.readme,
    )


def _slots(adapter: Adapter) -> dict[str, Slot]:
    """Return the place of every update that has factors; wrappers of one module are nested in order of definition."""
    slots: dict[str, Slot] = {}
    for name, update in adapter.items():
        inner = update.update if isinstance(update, Rebased) else update
        if isinstance(inner, LowRank | Stack | Dora):
            slots[name] = _slot(adapter, name, inner)
    return slots


def _slot(adapter: Adapter, name: str, update: Update) -> Slot:
    factored = update.direction if isinstance(update, Dora) else update
    if not isinstance(factored, LowRank | Stack):
        raise ConversionError(f"a direction of kind {factored.kind} is not a pair of factors", parameter=name)
    layout = _layout(adapter, name)
    form = FORMS[layout.get("form") or _form_for(name, factored)]
    path = str(layout.get("path") or _path(adapter, name, form))
    patterns = layout.get("patterns") or (layout.get("pattern") or (name if form is FORMS["experts"] else path),)
    return Slot(update, factored, form, layout, path, tuple(patterns))


def _layout(adapter: Adapter, name: str) -> Layout:
    """Return how the file wrote an update; of other formats, only how the base stores it is of use here."""
    layout = adapter.meta.layout.get(name, {}) if adapter.meta.source == "peft" else {}
    return {**layout, "stored": "in_out"} if is_turned(adapter, name) else layout


def _form_for(name: str, u: Factored) -> str:
    """Return the form of an update that did not come from a PEFT file."""
    if isinstance(u, Stack):
        return "experts" if len(u.shape) == 3 else "conv"
    if len(u.shape) > 2:
        return "conv"
    module, _, leaf = name.rpartition(".")
    if leaf == "in_proj_weight":
        return "in_proj"
    return "embedding" if module.rpartition(".")[2] in EMBEDDINGS else "linear"


def _path(adapter: Adapter, name: str, form: Form) -> str:
    """Return the module path of a parameter: wrappers of one module lie in each other, the first defined innermost."""
    module = name.rpartition(".")[0]
    if form is not FORMS["experts"]:
        if not module or name.rpartition(".")[2] not in ("weight", "in_proj_weight"):
            what = "PEFT adapts the weights of modules: this parameter is none"
            raise ConversionError(what, parameter=name, expected="a name that ends in .weight")
        return module
    siblings = [n for n, u in adapter.items() if isinstance(u, Stack) and n.rpartition(".")[0] == module]
    outer = [n for n in siblings if (place(n), siblings.index(n)) > (place(name), siblings.index(name))]
    return module + WRAPPER * len(outer)


def _told(slots: Iterable[Slot]) -> Told:
    """Return pattern path -> (rank, scale): the largest rank, the first scale of what shares a line of the config."""
    told: dict[str, tuple[int, float]] = {}
    for slot in slots:
        rank, scale = slot.told
        for pattern in slot.patterns:
            before = told.get(pattern, (rank, scale))
            told[pattern] = max(rank, before[0]), before[1]
    return told


def _tensors(adapter: Adapter, name: str, slots: Mapping[str, Slot], told: Told) -> dict[str, Tensor]:
    update, layout = adapter[name], _layout(adapter, name)
    if isinstance(update, Rebased):
        inner = replace(adapter, updates={**adapter.updates, name: update.update})
        key = (
            layout.get("base")
            or f"{PREFIX}{slots[name].path if name in slots else name.rpartition('.')[0]}{WRAPPER}.weight"
        )
        return {**_tensors(inner, name, slots, told), key: update.value}
    if name in slots:
        return _factors(slots[name], told)
    match update:
        case Dense() if layout.get("stored") == "lora_bias":
            path = layout["path"]
            owner = next(s for s in slots.values() if s.path == path)
            return {f"{PREFIX}{path}.{BIAS}": _bias(update, told[owner.patterns[0]][1])}
        case ReplaceRows():
            return {f"{PREFIX}{layout.get('path', name.removesuffix('.weight'))}.{ROWS}": update.rows}
        case Replace():
            return {layout.get("key") or _whole_key(name, slots): update.value}
    raise ConversionError(f"a {update.kind} update has no place in a PEFT LoRA file", parameter=name)


def _whole_key(name: str, slots: Mapping[str, Slot]) -> str:
    """Return the key of a replaced parameter; PEFT keeps the bias of an adapted module inside its ``base_layer``."""
    module = name.removesuffix(".bias")
    adapted = module != name and any(slot.path == module for slot in slots.values())
    return f"{PREFIX}{module}{WRAPPER}.bias" if adapted else PREFIX + name


def _factors(slot: Slot, told: Told) -> dict[str, Tensor]:
    """Return the tensors of one module, at the rank and scale that its line of the config says."""
    rank, scale = told[slot.patterns[0]]
    u = _fitted(slot, rank, scale)
    leaves = slot.form.write(u, slot.layout)
    if isinstance(slot.update, Dora):
        if slot.update.eps:
            raise ConversionError("PEFT's magnitudes have no epsilon", parameter=slot.path, got=slot.update.eps)
        if slot.update.axis != slot.form.magnitude_axis(slot.layout):
            what = "PEFT's magnitudes lie on the output axis, this one on the input axis"
            raise ConversionError(what, parameter=slot.path)
        leaves[MAGNITUDE] = slot.form.magnitude(u, slot.update.magnitude)
    return {f"{PREFIX}{slot.path}.{leaf}": tensor for leaf, tensor in leaves.items()}


def _fitted(slot: Slot, rank: int, scale: float) -> Factored:
    """Return the factors padded with zeros to ``rank``, with b taking what the config's scale does not say."""
    u, (own, said) = slot.factored, slot.told
    if own < rank:
        axis, size = len(shape_of(u.b)) - 1, u.rank * rank // own
        u = replace(u, b=widened(u.b, axis, size), a=widened(u.a, axis - 1, size))
    if said != scale:
        u = replace(u, b=_times(u.b, said / scale))
    return u


def _bias(update: Dense, scale: float) -> Tensor:
    """Return the bias of lora_B, which PEFT multiplies by the module's scale."""
    if update.scale == scale:
        return update.d
    return _times(update.d, update.scale / scale)


def _times(t: Tensor, factor: float) -> Tensor:
    """Return a multiple of a tensor in its own dtype, computed when it is read."""
    dtype = dtype_name(t)
    return lazily(t, shape_of(t), lambda x: down(up(x, working_dtype(x)) * factor, dtype))
