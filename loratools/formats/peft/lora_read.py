"""Reading LORA files: every tensor is converted, carried untouched, or refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from loratools.core.adapter import Absorbed, Adapter, Meta
from loratools.core.update import Leaf, Update
from loratools.errors import FormatError, UnsupportedError
from loratools.formats.metadata import HISTORY, history_of
from loratools.formats.peft.config import Settings, base_name, settings
from loratools.formats.peft.extras import explained
from loratools.formats.peft.forms import form_of
from loratools.formats.peft.forms.experts import order_of
from loratools.formats.peft.forms.form import Found, Known, Module, Remark, check_leaves, told
from loratools.formats.peft.forms.linear import Linear
from loratools.formats.peft.forms.wrappers import meanings, wrapped
from loratools.formats.peft.keys import SAVED
from loratools.formats.peft.lora_remarks import remarks_of
from loratools.formats.peft.lora_sort import Sorted, sort_keys
from loratools.formats.peft.orientation import orientations
from loratools.io.base import Base
from loratools.io.bundle import Bundle
from loratools.io.experts import stacked_shape, stored_apart
from loratools.kinds.rebased import Rebased
from loratools.kinds.replace import Replace

_ARROW = "an Arrow router mixes other adapters token by token: it is no update of weights"
_INVOKED = "an activated LoRA (alora_invocation_tokens) acts only on the tokens after its invocation"
_REPLICATED = "layer_replication repeats layers of the base, which the base's file holds once"


@dataclass
class _Reading:
    """What has been read so far."""

    updates: dict[str, Update] = field(default_factory=dict)
    layout: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    absorbed: dict[str, Absorbed] = field(default_factory=dict)
    unmergeable: dict[str, str] = field(default_factory=dict)
    leftover: dict[str, Leaf] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)


def read(bundle: Bundle, *, base: Base | None = None, allow_unknown: bool = False) -> Adapter:
    """Decode a LORA bundle. Ranks come from the tensors; a config that disagrees is reported among the remarks."""
    config = bundle.config or {}
    if config.get("arrow_config"):
        raise UnsupportedError(_ARROW, expected="one of the adapters that it routes to")
    said = settings(config)
    found = sort_keys(bundle.tensors)
    if not found.modules:
        raise FormatError("no LoRA factors in this file", expected="...lora_A.weight and ...lora_B.weight")
    modules = _modules(found, bundle, said, base)
    done = _Reading(leftover=found.leftover)
    for m in modules:
        for one in form_of(m).read(m):
            _add(done, m, one)
    _add_plain(done, found, config, allow_unknown=allow_unknown)
    never = _never(config)
    remarks = [*told(done.remarks), *remarks_of(found, config, said, modules)]
    if never is not None:
        remarks.append(f"{never}: it can be compressed, not merged")
    if "others" in bundle.hints:
        remarks.append(f"there are adapters in {bundle.hints['others']}, too: each is read by its own path")
    meta = Meta(
        format="peft",
        namespace="hf",
        base_id=base_name(config),
        config=config,
        metadata={k: v for k, v in bundle.metadata.items() if k != HISTORY},
        layout=done.layout,
        leftover=done.leftover,
        remarks=tuple(remarks),
        history=history_of(bundle.metadata),
        path=bundle.path,
        siblings=bundle.siblings,
        readme=bundle.readme,
        absorbed=done.absorbed,
        unmergeable=done.unmergeable if never is None else dict.fromkeys(done.updates, never),
    )
    return Adapter(done.updates, meta)


def _modules(found: Sorted, bundle: Bundle, said: Settings, base: Base | None) -> list[Module]:
    """Return the modules with what is known about each, the base's shapes included."""
    config = bundle.config or {}
    names = wrapped(found.modules, config, said)
    known = Known(
        config,
        said,
        frozenset(found.modules),
        wrapped={path: tuple(meant) for path, meant in names.items()},
        expert_order=order_of(bundle.hints.get("expert_order"), _texts(bundle)),
        order_told="expert_order" in bundle.hints,
        model_type=None if base is None else base.config.get("model_type"),
    )
    first = [Module(path, parts, known) for path, parts in found.modules.items()]
    for m in first:
        check_leaves(m, form_of(m))
    shapes = (
        {} if base is None else _shapes(first, base) | {name: leaf.shape for name, (_, leaf) in found.plain.items()}
    )
    known = replace(known, shapes=shapes, wrapped=meanings(found.modules, names, shapes))
    linear = {m.path: m for m in (replace(m, known=known) for m in first) if isinstance(form_of(m), Linear)}
    sizes = {path: Linear().shape(m) for path, m in linear.items()}
    turned = orientations(
        sizes, said.fan_in_fan_out, None if base is None else {p: shapes[f"{p}.weight"] for p in sizes}
    )
    known = replace(known, turned=turned)
    return [replace(m, known=known) for m in first]


def _texts(bundle: Bundle) -> tuple[str, ...]:
    """Return where a program that writes adapters may name itself."""
    return str(bundle.config), str(bundle.metadata), bundle.hints.get("readme", "")


def _shapes(modules: Iterable[Module], base: Base) -> dict[str, tuple[int, ...]]:
    """Return adapter name -> shape in the base, of every parameter that the modules may mean."""
    sure = [name for m in modules if m.path not in m.known.wrapped for name in form_of(m).parameters(m)]
    open_names = [name for m in modules if m.path in m.known.wrapped for name in form_of(m).parameters(m)]
    names = base.resolve(sure) | base.resolve(open_names, optional=open_names)
    apart = stored_apart((name for name in open_names if name not in names), base.shapes)
    whole = {name: base.shapes[target] for name, target in names.items()}
    return whole | {name: stacked_shape(parts, base.shapes) for name, parts in apart.items()}


def _add(done: _Reading, m: Module, one: Found) -> None:
    if one.name in done.updates:
        raise FormatError("two modules change one parameter", parameter=one.name, got=m.path)
    done.updates[one.name] = one.update
    done.layout[one.name] = one.layout
    done.remarks.extend(one.remarks)
    done.leftover |= {m.parts[leaf][0]: m[leaf] for leaf in one.idle}
    if one.absorbed:
        done.absorbed[one.name] = Absorbed(one.update, dict(m.parts.values()))
    if one.unmergeable is not None:
        done.unmergeable[one.name] = one.unmergeable


def _add_plain(done: _Reading, found: Sorted, config: Mapping[str, Any], *, allow_unknown: bool) -> None:
    for name, (key, leaf) in found.plain.items():
        if name in done.updates:
            done.updates[name] = Rebased(leaf, done.updates[name])
            done.layout[name] = {**done.layout[name], "base": key}
        elif explained(name, key, config, found.modules):
            done.updates[name] = Replace(leaf)
            done.layout[name] = {} if SAVED in key else {"key": key}
        elif allow_unknown:
            done.leftover[key] = leaf
            done.remarks.append(f"{key}: unknown tensor, carried untouched")
        else:
            raise FormatError(
                "a tensor that the config does not explain",
                parameter=key,
                expected="a LoRA factor, a bias (bias=...), or a module listed in modules_to_save",
                hint="--allow-unknown carries it through untouched",
            )


def _never(config: Mapping[str, Any]) -> str | None:
    """Return why no update of the adapter can be added to the base, or None."""
    if config.get("alora_invocation_tokens"):
        return _INVOKED
    return _REPLICATED if config.get("layer_replication") else None
