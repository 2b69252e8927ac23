"""Reading LORA files: every tensor is converted, carried untouched, or refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from loratools.core.adapter import Adapter
from loratools.errors import FormatError, LoratoolsError, UnsupportedError
from loratools.formats.peft.config import Settings, settings
from loratools.formats.peft.forms import form_of
from loratools.formats.peft.forms.absorbed import LATENT
from loratools.formats.peft.forms.experts import order_of
from loratools.formats.peft.forms.form import A, Known, Module, check_leaves, told
from loratools.formats.peft.forms.linear import Linear
from loratools.formats.peft.forms.wrappers import meanings, wrapped
from loratools.formats.peft.lora_remarks import remarks_of
from loratools.formats.peft.lora_sort import Sorted, sort_keys
from loratools.formats.peft.orientation import orientations
from loratools.formats.peft.reading import Reading
from loratools.io.base import Base
from loratools.io.bundle import Bundle
from loratools.io.experts import stacked_shape, stored_apart

_ARROW = "an Arrow router mixes other adapters token by token: it is no update of weights"
_INVOKED = "an activated LoRA (alora_invocation_tokens) acts only on the tokens after its invocation"
_RECONSTRUCTION = "reconstr_config.json"
_REPLICATED = "layer_replication repeats layers of the base, which the base's file holds once"


def read(bundle: Bundle, *, base: Base | None = None, allow_unknown: bool = False) -> Adapter:
    """Decode a LORA bundle. Ranks come from the tensors; a config that disagrees is reported among the remarks."""
    config = bundle.config or {}
    if config.get("arrow_config"):
        raise UnsupportedError(_ARROW, expected="one of the adapters that it routes to")
    try:
        said = settings(config)
    except LoratoolsError as error:  # the fault lies there, not in the weights
        raise error.at(file=bundle.path and bundle.path.with_name("adapter_config.json")) from error
    found = sort_keys(bundle.tensors)
    if not found.modules:
        raise FormatError("no LoRA factors in this file", expected="...lora_A.weight and ...lora_B.weight")
    _need_cores(found, bundle)
    modules = _modules(found, bundle, said, base)
    done = Reading(leftover=found.leftover)
    for m in modules:
        for one in form_of(m).read(m):
            done.add(m.path, m.parts, one)
    done.add_plain(found, config, allow_unknown=allow_unknown)
    never = _never(config)
    remarks = [*told(done.remarks), *remarks_of(found, config, said, modules)]
    if never is not None:
        remarks.append(f"{never}: it can be compressed, not merged")
        done.unmergeable = dict.fromkeys(done.updates, never)
    return done.adapter(bundle, remarks)


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


def _need_cores(found: Sorted, bundle: Bundle) -> None:
    """Raise :class:`FormatError` where LoRA-XS left its own settings beside factors that have no core between them."""
    bare = [path for path, parts in found.modules.items() if A in parts and LATENT not in parts]
    if bare and any(file.name == _RECONSTRUCTION for file in bundle.siblings):
        raise FormatError(
            f"{_RECONSTRUCTION} says LoRA-XS, whose update is B R A, but there is no core R",
            parameter=bare[0],
            expected=f"...{LATENT}",
            hint="save the adapter with every trained tensor; without R its factors mean nothing",
        )


def _never(config: Mapping[str, Any]) -> str | None:
    """Return why no update of the adapter can be added to the base, or None."""
    if config.get("alora_invocation_tokens"):
        return _INVOKED
    return _REPLICATED if config.get("layer_replication") else None
