"""The keys of a LORA file, sorted: factors by module, plain parameters, and what only serves training."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field

from loratools.core.update import Leaf
from loratools.errors import FormatError, UnsupportedError
from loratools.formats.peft.forms import FORMS
from loratools.formats.peft.forms.absorbed import LATENT
from loratools.formats.peft.forms.form import need_elements
from loratools.formats.peft.keys import ORIGINAL, SAVED, Key, is_original, parameter, parse, saved_segment

Parts = dict[str, tuple[str, Leaf]]  # leaf name -> (key, tensor)
SAMPLER = "lora_monteclora_sampler."  # MonteCLoRA's sampler: its sizes are those of the ranks
TRAINING_ONLY = (SAMPLER, "lora_velora_embed")
_KNOWN = frozenset(leaf for form in FORMS.values() for leaf in (*form.needs, *form.may))
_FOREIGN = {"lora_E": "AdaLoRA's singular values in a file of type LORA", "lora_arrow": "an Arrow router"}


@dataclass
class Sorted:
    """``plain`` is parameter -> (key, tensor); ``leftover`` is carried; ``adapters`` are names left in the keys."""

    modules: dict[str, Parts] = field(default_factory=dict)
    plain: dict[str, tuple[str, Leaf]] = field(default_factory=dict)
    leftover: dict[str, Leaf] = field(default_factory=dict)
    adapters: set[str] = field(default_factory=set)
    training: set[str] = field(default_factory=set)
    remarks: list[str] = field(default_factory=list)


def sort_keys(
    tensors: Mapping[str, Leaf], parse: Callable[[str], Key] = parse, known: Container[str] | None = _KNOWN
) -> Sorted:
    """Return the tensors of a file sorted. Raises :class:`FormatError` for doubles and for several adapters at once.

    ``parse`` is the grammar of the type's keys, ``known`` its leaves (None: whatever ``parse`` finds).
    """
    found = Sorted()
    plain: dict[str, tuple[str, Leaf]] = {}  # key -> (path, tensor)
    cores = {key: leaf for key, leaf in tensors.items() if key.endswith(LATENT)}
    for key, leaf in tensors.items():
        if key in cores:
            continue
        parsed = parse(key)
        if parsed.leaf.startswith(TRAINING_ONLY):
            found.leftover[key] = leaf
            found.training.add(parsed.leaf.partition(".")[0])
        elif parsed.leaf:
            _add_factor(found, key, leaf, parsed, known)
        elif is_original(parsed.path):
            found.leftover[key] = leaf
        else:
            plain[key] = parsed.path, leaf
    for key, leaf in cores.items():
        _add_factor(found, key, leaf, _core(key, found), known)
    names = _saved_names(found, [path for path, _ in plain.values()])
    for key, (path, leaf) in plain.items():
        _add_plain(found, key, leaf, path, names)
    if len(found.adapters) > 1:
        raise FormatError(
            "several adapters in one file",
            got=", ".join(sorted(found.adapters)),
            hint="save each by itself: model.save_pretrained(DIR, selected_adapters=[NAME])",
        )
    return found


def _core(key: str, found: Sorted) -> Key:
    """Return whose core it is: older savers glue it to the module's name, newer ones to the adapter's."""
    stem = parse(key.removesuffix(LATENT)).path
    for path, adapter in ((stem[:-1], None), (stem[:-1].rpartition(".")[0], stem[:-1].rpartition(".")[2])):
        if stem[-1:] in ("_", ".") and path in found.modules:
            return Key(path, LATENT, adapter)
    raise FormatError("a core of LoRA-XS without its factors", parameter=key, expected="lora_A and lora_B beside it")


def _add_factor(found: Sorted, key: str, leaf: Leaf, parsed: Key, known: Container[str] | None) -> None:
    if known is not None and parsed.leaf not in known:
        what = _FOREIGN.get(parsed.leaf.partition(".")[0], f"tensors named {parsed.leaf}")
        raise UnsupportedError(f"{what}: not read by this version", parameter=parsed.path, got=key)
    parts = found.modules.setdefault(parsed.path, {})
    if parsed.leaf in parts:
        if parsed.adapter and found.adapters - {parsed.adapter}:
            found.adapters.add(parsed.adapter)  # two names explain the double: the caller tells them
            return
        raise FormatError("two keys name one tensor", parameter=parsed.path, got=f"{parts[parsed.leaf][0]} and {key}")
    parts[parsed.leaf] = (key, leaf)
    if parsed.adapter:
        found.adapters.add(parsed.adapter)


def _saved_names(found: Sorted, paths: Iterable[str]) -> frozenset[str]:
    """Return the adapter names after ``modules_to_save``: those of the factors, else the one that all modules share.

    A raw state dict always has one there; who takes it out may leave ``modules_to_save`` before a submodule's name.
    """
    saved = [path for path in paths if SAVED in path]
    seen = sorted({saved_segment(path) for path in saved} - {("", "")})
    segments = {segment for _, segment in seen}
    named = segments & (found.adapters | {"default"})
    originals = {key.partition(ORIGINAL)[2] for key in found.leftover if ORIGINAL in key}
    as_in_base = not originals.isdisjoint(path.partition(SAVED)[2] for path in saved)
    if len(segments) == 1 and not found.adapters and not named and not as_in_base:
        named = segments
        if len(seen) == 1 and not originals:
            module, name = seen[0]
            what = f"{name!r} is read as the adapter's name, not as a submodule of {module}"
            found.remarks.append(f"{module}{SAVED}{name}: {what}")
    found.adapters |= named
    return frozenset(named)


def _add_plain(found: Sorted, key: str, leaf: Leaf, path: str, names: frozenset[str]) -> None:
    """Keep one tensor per parameter; a second spelling of it must hold the same bytes and is carried."""
    name, plainly = parameter(path, names)
    need_elements(name, key, leaf)
    if name not in found.plain:
        found.plain[name] = (key, leaf)
        return
    first_key, first = found.plain[name]
    if first.shape != leaf.shape or first.dtype != leaf.dtype or first.read().tobytes() != leaf.read().tobytes():
        raise FormatError("two spellings of one parameter differ", parameter=name, got=f"{first_key} and {key}")
    if plainly:
        found.plain[name] = (key, leaf)
    found.leftover[first_key if plainly else key] = first if plainly else leaf
