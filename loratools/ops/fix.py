"""fix: the version of an adapter that its consumer loads right. Exact, or refused by name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratools.consumers.base import CONSUMERS, Recipe
from loratools.consumers.peft import targeted
from loratools.consumers.subject import Subject
from loratools.core import generic
from loratools.core.adapter import Adapter
from loratools.core.rows import row_ranges, slice_rows
from loratools.core.update import KINDS, Array, Delta, Leaf, Update
from loratools.errors import ConversionError, LoratoolsError, MissingScaleError, NeedsBaseError
from loratools.files import save
from loratools.formats.base import FORMATS
from loratools.io.base import Base
from loratools.kinds.lowrank import LowRank, low_rank, padded, restated, with_low_rank
from loratools.kinds.rebased import Rebased
from loratools.linalg.namespace import to_numpy, up
from loratools.ops.altered import advice, initialisation, recover
from loratools.outputs import check_target

EXTRAS = ("replace", "replace_rows", "rebased", "dense")  # whole values and biases: they can live beside the factors
BLOCK_BYTES = 16 << 20  # compared at once
ALTERS = ("peft",)  # consumers that alter the base themselves where an adapter is relative to an altered one
ONE_MODEL = ("peft", "mlx", "gguf")  # formats whose names are one model's own
_PEFT_TYPE = {"peft_type": "LORA"}


@dataclass(frozen=True)
class Fixed:
    """What ``fix`` wrote: the file, the extras that were moved aside (and where), and the steps in words."""

    path: Path
    aside: Path | None
    extras: tuple[str, ...]
    steps: tuple[str, ...]


def fix(
    subject: Subject, consumer: str, output: Path, *, overwrite: bool = False, dry_run: bool = False,
    **options: Any,
) -> Fixed:  # fmt: skip
    """Write the adapter of ``subject`` so that ``consumer`` loads it and applies it right.

    Scales are said once for the file (folded into ``b`` where they differ), ranks padded with zero columns to one that
    is legal, names mapped onto the base's, kinds converted along exact routes. What the consumer cannot hold (whole
    modules, biases) moves into ``<output>-extras.safetensors``, for ``loratools merge`` into the base. ``options``
    go to the writer of the format. Cost: one read and one write.

    Raises :class:`ConversionError` for updates that only a lossy route or a merge would bring there, and whatever made
    the file unreadable.
    """
    recipe = CONSUMERS[consumer].recipe
    adapter = _repaired(subject)
    steps: list[str] = []
    if consumer not in ALTERS:
        adapter = _plain(adapter, subject.base, steps)
    if recipe.format in ONE_MODEL:
        adapter = _named(adapter, subject.base, steps)
    kept, extras = _parted(adapter, recipe, subject.base, steps)
    kept = _shaped(kept, recipe, steps)
    kept = _described(kept, recipe, steps, moved=bool(extras))
    kept = kept.with_history(f"made to load in {consumer}")
    stray = adapter.meta.leftover
    aside = _aside(output) if extras or stray else None
    for target, format in ((output, recipe.format), (aside, "native")):
        if target is not None:
            check_target(replace(adapter, meta=replace(adapter.meta, format=format)), target, overwrite=overwrite)
    if extras:
        steps.append(f"{len(extras)} parameters moved aside into {_aside(output).name}: merge them into the base")
    if stray:
        steps.append(
            f"{len(stray)} unexplained tensors moved aside into {_aside(output).name}: {', '.join([*stray][:3])}"
        )
    if not dry_run:
        save(kept, output, format=recipe.format, base=subject.base, overwrite=overwrite, **options)
        if aside is not None:
            meta = replace(adapter.meta, layout={}, config={}, siblings=(), readme=None)
            save(Adapter(extras, meta), aside, format="native", overwrite=overwrite)
    return Fixed(output, aside, (*extras, *stray), tuple(steps))


def _plain(adapter: Adapter, base: Base | None, steps: list[str]) -> Adapter:
    """Return an adapter of the original base: recovered from it where that is enough; else ConversionError."""
    init = initialisation(adapter.meta.config)
    if init is None:
        return adapter
    try:
        done = recover(adapter, base=base)
    except LoratoolsError as error:
        raise ConversionError(
            f"the factors are relative to a base that {init} altered: {error.what}", hint=advice(init)
        ) from None
    steps.append(f"made plain LoRA of the original base from {init}")
    return replace(done, report=None)


def _aside(output: Path) -> Path:
    return output.with_name(f"{output.name.removesuffix('.safetensors').removesuffix('.gguf')}-extras.safetensors")


def _repaired(subject: Subject) -> Adapter:
    """Return the adapter, with fields of the config put in that its tensors say; else raise what stopped the reader."""
    if subject.adapter is not None and subject.format == "gguf" and subject.base is not None:
        return FORMATS["gguf"].decode(
            subject.bundle, base=subject.base, allow_unknown=True
        )  # head counts give the names back
    if subject.adapter is not None:
        return _scaled(subject.adapter)
    assert subject.problem is not None
    ranks = [t.shape[0] for key, t in subject.tensors.items() if key.endswith("lora_A.weight")]
    if subject.bundle.config is None or "lora_alpha" not in subject.config or not ranks:
        raise subject.problem
    rank = Counter(ranks).most_common(1)[0][0]
    config = {**_PEFT_TYPE, "r": rank, **{k: v for k, v in subject.config.items() if v is not None}}
    try:
        return FORMATS["peft"].decode(replace(subject.bundle, config=config), allow_unknown=True)
    except LoratoolsError:
        raise subject.problem from None


def _scaled(adapter: Adapter) -> Adapter:
    if not adapter.meta.scaled:
        raise MissingScaleError(f"a {adapter.meta.source} file that does not say how strongly its factors act",
                                hint="loratools convert IN --to FORMAT --scale NUMBER")  # fmt: skip
    return adapter


def _named(adapter: Adapter, base: Base | None, steps: list[str]) -> Adapter:
    """Return the adapter under the base's names, where a base is given and knows them by others."""
    if base is None:
        return adapter
    names = base.resolve(adapter, optional=[n for n in adapter if adapter[n].kind in EXTRAS])
    if all(names.get(n, n) == n for n in adapter):
        return adapter
    steps.append(f"names mapped onto the base's, e.g. {next(n for n in names if names[n] != n)} -> "
                 f"{next(names[n] for n in names if names[n] != n)}")  # fmt: skip
    updates = {names.get(n, n): u for n, u in adapter.items()}
    layout = {names.get(n, n): _stored(e) for n, e in adapter.meta.layout.items()}
    return replace(adapter, updates=updates, meta=replace(adapter.meta, layout=layout))


def _stored(layout: Mapping[str, Any]) -> Mapping[str, Any]:
    return {key: layout[key] for key in ("stored",) if key in layout}


def _parted(adapter: Adapter, recipe: Recipe, base: Base | None, steps: list[str]) -> tuple[Adapter, dict[str, Update]]:
    """Return what the consumer applies, in kinds that it knows, and the extras to move aside."""
    kept: dict[str, Update] = {}
    extras: dict[str, Update] = {}
    kinds = tuple(KINDS[name] for name in recipe.kinds)
    for name, whole in adapter.items():
        u = whole
        if isinstance(u, Rebased) and isinstance(u.update, kinds) and recipe.takes(name, u.shape):
            u = u.update if base is not None and _is_of(base, name, u.value) else u
        if u is not whole:
            steps.append(f"{name}: the copy in the file is the base's own, only its update is written")
        if isinstance(u, kinds) and recipe.takes(name, u.shape):
            kept[name] = u
        elif u.kind in EXTRAS:
            extras[name] = u
        else:
            kept[name] = _converted(name, u, kinds, recipe, base)
    if not kept:
        raise ConversionError("nothing in the file is of a kind that the consumer applies", got=f"{len(extras)} extras")
    return replace(adapter, updates=kept, meta=replace(adapter.meta, leftover={})), extras


def _is_of(base: Base, name: str, value: Leaf | Array) -> bool:
    """True if a parameter that the adapter brings along has the values of the base's, whatever the dtypes."""
    stored = base.resolve([name], optional=[name]).get(name)
    if stored is None or base.shapes[stored] != tuple(value.shape):
        return False
    leaf = base.leaf(stored)
    return all(
        bool((up(slice_rows(leaf, i, j)) == up(slice_rows(value, i, j))).all())
        for i, j in row_ranges(leaf, BLOCK_BYTES)
    )


def _converted(name: str, u: Update, kinds: tuple[type[Update], ...], recipe: Recipe, base: Base | None) -> Update:
    if isinstance(u, kinds):
        raise ConversionError("the consumer does not adapt this module", parameter=name,
                              hint="fold the adapter into the base: loratools merge BASE IN -o OUT")  # fmt: skip
    if not isinstance(u, Delta):
        if base is None:
            raise NeedsBaseError(
                f"a {u.kind} update has no exact form here without its base",
                parameter=name,
                hint="--base BASE, or fold it into the base: loratools merge BASE IN -o OUT",
            )
        u = u.delta(base[base.resolve([name])[name]])
    try:
        return generic.convert(u, kinds)
    except ConversionError as error:
        error.hint = f"{error.hint or ''} (fold it into the base instead: loratools merge BASE IN -o OUT)".strip()
        raise error.at(parameter=name) from None


def _shaped(adapter: Adapter, recipe: Recipe, steps: list[str]) -> Adapter:
    """Return the adapter at one scale and one rank, where the recipe asks for them."""
    pairs = {name: pair for name, u in adapter.items() if (pair := low_rank(u)) is not None}
    if not pairs:
        return adapter
    rank = _one_rank(max(u.rank for u in pairs.values()), recipe)
    scale = _one_scale(pairs, rank)
    if recipe.one_scale and any(u.scale != scale for u in pairs.values()):
        steps.append("unequal scales folded into lora_B")
        pairs = {name: restated(u, scale=scale) for name, u in pairs.items()}
    if recipe.uniform and any(u.rank != rank for u in pairs.values()):
        steps.append(f"ranks padded to {rank}")
        pairs = {name: padded(_read(u), rank, name=name) for name, u in pairs.items()}
    return replace(adapter, updates={n: with_low_rank(u, pairs[n]) if n in pairs else u for n, u in adapter.items()})


def _read(u: LowRank) -> LowRank:
    return replace(u, b=to_numpy(u.b), a=to_numpy(u.a))


def _one_rank(largest: int, recipe: Recipe) -> int:
    return next((legal for legal in recipe.ranks if legal >= largest), largest)


def _one_scale(pairs: Mapping[str, LowRank], rank: int) -> float:
    """Return the common scale if an integer alpha says it at the rank of the file, else 1."""
    scales = {u.scale for u in pairs.values()}
    common = scales.pop()
    return common if not scales and (common * rank).is_integer() else 1.0


def _described(adapter: Adapter, recipe: Recipe, steps: list[str], *, moved: bool) -> Adapter:
    """Return the adapter with a PEFT config that says no more than its consumer understands."""
    if (
        recipe.format == "diffusers" and adapter.meta.source == "diffusers"
    ):  # its keys in today's spelling, not as found
        layout = {name: _stored(said) for name, said in adapter.meta.layout.items()}
        return replace(adapter, meta=replace(adapter.meta, layout=layout))
    if recipe.format == "mlx" and adapter.meta.source == "mlx":
        return _all_layers(adapter)
    if recipe.format != "peft" or adapter.meta.source != "peft":
        return adapter
    config = {**_PEFT_TYPE, **adapter.meta.config}
    pairs = {name.removesuffix(".weight"): p for name, u in adapter.items() if (p := low_rank(u)) is not None}
    if recipe.uniform and pairs:
        some = next(iter(pairs.values()))
        config |= {"r": some.rank, "lora_alpha": _number(some.scale * some.rank), "use_rslora": False,
                   "rank_pattern": {}, "alpha_pattern": {}}  # fmt: skip
        steps.append(f"config says r={some.rank}, lora_alpha={config['lora_alpha']} and nothing else about scales")
    if "replace" not in recipe.kinds:
        config |= {"bias": "none", "modules_to_save": None, "trainable_token_indices": None}
        config |= {"task_type": None} if moved else {}
    config["use_dora"] = any(u.kind == "dora" for u in adapter.values())
    if not all(targeted(config.get("target_modules"), path) for path in pairs):
        config["target_modules"] = sorted(pairs)
        steps.append("target_modules lists the modules of the file")
    saved = config.get("modules_to_save")
    if saved and (lost := [m for m in saved if not any(re.search(rf"\b{re.escape(m)}\b", n) for n in adapter)]):
        config["modules_to_save"] = [m for m in saved if m not in lost] or None
        steps.append(f"modules_to_save without {', '.join(lost)}, whose tensors the file lacks")
    return replace(adapter, meta=replace(adapter.meta, config=config))


def _all_layers(adapter: Adapter) -> Adapter:
    """Return an MLX adapter whose config will be written from its modules, for all layers of the model."""
    said = {k: v for k, v in adapter.meta.config.get("lora_parameters", {}).items() if k not in ("rank", "keys")}
    config = {**adapter.meta.config, "num_layers": -1, "lora_parameters": said}
    return replace(adapter, meta=replace(adapter.meta, config=config))


def _number(alpha: float) -> int | float:
    return int(alpha) if float(alpha).is_integer() else alpha
