"""What a LORA config must name so that PEFT loads every tensor: it drops in silence what the config does not reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loratools.core.adapter import Adapter
from loratools.errors import ConversionError
from loratools.formats.peft.extras import explained
from loratools.kinds.dora import Dora
from loratools.kinds.rebased import Rebased

FILTERS = ("layers_to_transform", "layers_pattern", "exclude_modules")
Config = Mapping[str, Any]


def in_line(config: Config, adapter: Adapter, modules: Mapping[str, bool], parameters: Sequence[str]) -> dict[str, Any]:
    """Return the config with what no longer holds said anew: targets, saved modules, biases, ``use_dora``.

    ``modules`` are the paths of modules with factors -> whether the config came with them, ``parameters`` the names
    that wrappers stand for. Raises :class:`ConversionError` for a parameter that no setting of PEFT can name.
    """
    dora = any(isinstance(u.update if isinstance(u, Rebased) else u, Dora) for u in adapter.values())
    return {
        **config,
        **({"use_dora": dora} if bool(config.get("use_dora")) != dora else {}),
        **_targets(config, modules),
        **_parameters(config, parameters),
        **_whole(config, adapter, modules),
    }


def _targets(config: Config, modules: Mapping[str, bool]) -> dict[str, Any]:
    """Return the settings of ``target_modules`` where they do not reach every module.

    They are trusted for the modules that they came with (PEFT knows more: tied weights, kinds of model). For others,
    names are added to a list; in place of an expression or of filters, all modules are listed.
    """
    said = config.get("target_modules")
    filters = [field for field in FILTERS if config.get(field)]
    names = said if isinstance(said, list | tuple) and not filters else ()
    missing = sorted(path for path, known in modules.items() if not known and not _named(names, path))
    if not missing:
        return {}
    return {"target_modules": [*names, *missing] if names else sorted(modules), **dict.fromkeys(filters)}


def _parameters(config: Config, names: Sequence[str]) -> dict[str, Any]:
    said = config.get("target_parameters") or ()
    said = (said,) if isinstance(said, str) else said
    missing = sorted({name for name in names if not _named(said, name)})
    return {"target_parameters": [*said, *missing]} if missing else {}


def _named(said: Sequence[str], path: str) -> bool:
    """True if one of the names is the path or ends it, as PEFT matches them."""
    return any(path == name or path.endswith(f".{name}") for name in said)


def _whole(config: Config, adapter: Adapter, modules: Mapping[str, bool]) -> dict[str, Any]:
    """Return ``modules_to_save`` and ``bias`` where they do not explain every replaced parameter."""
    replaced = [name for name, u in adapter.items() if u.kind == "replace"]
    layout = adapter.meta.layout if adapter.meta.source == "peft" else {}
    missing = [n for n in replaced if not explained(n, layout.get(n, {}).get("key", n), config, modules)]
    biases = [name for name in missing if name.endswith(".bias") and name.removesuffix(".bias") in modules]
    saved = sorted({_module(name, modules) for name in missing if name not in biases})
    before = config.get("modules_to_save") or ()
    before = (before,) if isinstance(before, str) else before
    return {
        **({"modules_to_save": [*before, *saved]} if saved else {}),
        **({"bias": "lora_only"} if biases else {}),
    }


def _module(name: str, modules: Mapping[str, bool]) -> str:
    """Return the module to save for a parameter; PEFT saves a module whole or adapts parts of it, never both."""
    module = name.rpartition(".")[0]
    if not module or any(f"{path}.".startswith(f"{module}.") for path in modules):
        raise ConversionError(
            "a replaced parameter that no saved module of PEFT can hold",
            parameter=name,
            expected="a parameter of a module without factors",
        )
    return module
