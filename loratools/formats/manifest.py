"""A manifest beside tensors that no program's rules explain: it names them and says their algebra. docs/manifest.md

``[[update]]`` tables hold ``name`` (of the base parameter), one of ``delta`` (an expression, see
:mod:`loratools.formats.expressions`) and ``replace`` (a tensor), and optionally ``scale`` and ``shape``. A placeholder
``{i}`` in them stands for every number that the weights know, or for the words that ``where`` lists.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from loratools.core.adapter import Adapter
from loratools.core.update import Delta, Leaf, Update
from loratools.errors import FormatError, LoratoolsError, UnsupportedError
from loratools.formats.algebra import with_shape
from loratools.formats.base import FORMATS, Format
from loratools.formats.expressions import Scope, filled, names_in, update_of
from loratools.formats.kept import absorbed, is_untouched, written_back
from loratools.formats.matrices import matrix, scaled
from loratools.formats.modules import Found, refuse_options
from loratools.io.base import Base
from loratools.io.bundle import Bundle
from loratools.io.manifest import FILES, KEY, parse_manifest
from loratools.kinds.replace import Replace

VERSION = 1
_TOP = ("manifest", "weights", "files", "base", "carry", "update", "reader", "settings")
_UPDATE = ("name", "delta", "replace", "scale", "shape", "where", "experts")
_PLACE = re.compile(r"\{([A-Za-z_]\w*)\}")
MIXTURE = "a routed mixture: no single update says what it does"
MIXTURE_HINT = "loratools collapse makes a static adapter of some of its experts"


def said_in(bundle: Bundle) -> dict[str, Any] | None:
    """Return the manifest of a bundle, checked for words that nobody reads; None where it has none."""
    text = bundle.metadata.get(KEY)
    if text is None:
        return None
    said = parse_manifest(text, bundle.path)
    _known(said, _TOP, "the manifest")
    if said.get("manifest") != VERSION:
        raise FormatError("unknown version of the manifest", expected=f"manifest = {VERSION}", got=said.get("manifest"))
    if not isinstance(said.get("base", ""), str) or not isinstance(said.get("settings", {}), dict):
        raise FormatError("the manifest's base is a name, its settings are a table", file=bundle.path)
    return said


def files_in(bundle: Bundle) -> dict[str, Any]:
    """Return the JSON files that a manifest names, by their names there."""
    files: dict[str, Any] = json.loads(bundle.metadata.get(FILES, "{}"))
    return files


class Manifest(Format):
    """Tensors whose algebra a manifest says."""

    name = "manifest"
    accepts: ClassVar[tuple[type[Update], ...]] = (Update,)

    def holds(self, adapter: Adapter, name: str) -> bool:
        """Only what was read from such a file and not changed."""
        return adapter.meta.source == self.name and is_untouched(adapter, name)

    def declines(self, bundle: Bundle) -> str | None:
        """Claim a bundle that comes with a manifest, unless that names a paper's reader."""
        if KEY not in bundle.metadata:
            return "no manifest (NAME.toml) was given"
        return "its manifest names a reader" if "reader" in parse_manifest(bundle.metadata[KEY], bundle.path) else None

    def decode(self, bundle: Bundle, *, base: Base | None = None, allow_unknown: bool = False) -> Adapter:
        """Put every update together; tensors that the manifest does not name are refused, or carried."""
        said = said_in(bundle)
        if said is None:
            raise FormatError("no manifest with these tensors", expected="NAME.toml", hint="give the manifest as input")
        found, used = Found(), dict[str, dict[str, Leaf]]()
        for entry in entries(said):
            if "experts" in entry:
                raise UnsupportedError(MIXTURE, parameter=entry["name"], hint=MIXTURE_HINT)
            for bound in bindings(entry, bundle.tensors):
                name, update, made_of = one(entry, bundle.tensors, bound)
                found.add(name, update, {})
                used[name] = made_of
        every = {key for made_of in used.values() for key in made_of}
        kept = _texts(said.get("carry", []), "carry")
        rest = {key: leaf for key, leaf in bundle.tensors.items() if key not in every}
        found.rest(rest, allow_unknown=allow_unknown, known=lambda key: any(fnmatchcase(key, p) for p in kept))
        metadata = {key: text for key, text in bundle.metadata.items() if key not in (KEY, FILES)}
        config = {"manifest": bundle.metadata[KEY], "files": bundle.metadata.get(FILES, "")}
        read = found.adapter(
            replace(bundle, metadata=metadata), self.name, base, config=config, base_id=said.get("base")
        )
        return replace(read, meta=replace(read.meta, absorbed=absorbed(dict(read), used)))

    def encode(self, adapter: Adapter, *, base: Base | None = None, **options: Any) -> Bundle:
        """Write back what was read, with the manifest among the metadata; changed adapters become native files."""
        refuse_options(self.name, options)
        config = adapter.meta.config
        said = {KEY: config.get("manifest", "")} | ({FILES: config["files"]} if config.get("files") else {})
        return written_back(adapter, self.name, said)


def entries(said: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the ``[[update]]`` tables, checked."""
    tables = said.get("update")
    if not isinstance(tables, list) or not tables or not all(isinstance(t, dict) for t in tables):
        raise FormatError("the manifest describes no update", expected="[[update]] with name and delta")
    for table in tables:
        _known(table, _UPDATE, "[[update]]")
        if not isinstance(table.get("name"), str) or ("delta" in table) == ("replace" in table):
            expected = "name, and either delta or replace"
            raise FormatError("an [[update]] is not complete", expected=expected, got=", ".join(table))
        _check_where(table)
    return tables


def one(
    entry: Mapping[str, Any], tensors: Mapping[str, Leaf], bound: Mapping[str, str]
) -> tuple[str, Update, dict[str, Leaf]]:
    """Return (parameter name, update, tensors it is made of) of an entry under one reading of its placeholders."""
    scope, name = Scope(tensors, bound), filled(entry["name"], bound)
    try:
        if "replace" in entry:
            return name, Replace(scope.tensor(_text(entry["replace"], "replace"))), scope.used
        return name, _shaped(delta_of(entry, scope), entry), scope.used
    except LoratoolsError as error:
        raise error.at(parameter=name) from None


def delta_of(entry: Mapping[str, Any], scope: Scope) -> Delta:
    """Return the scaled update of an entry."""
    update = update_of(entry["delta"], scope)
    said = entry.get("scale", 1.0)
    if isinstance(said, float) and not math.isfinite(said):
        raise FormatError("a scale is no number", expected="a finite number, or the name of a tensor", got=said)
    return update if said == 1.0 else matrix(scaled(update, scope.tensor(said) if isinstance(said, str) else said))


def _shaped(update: Delta, entry: Mapping[str, Any]) -> Update:
    shape = entry.get("shape")
    if shape is None:
        return update
    if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape) or len(shape) < 2:
        raise FormatError("shape is no list of sizes", expected="[out, in, ...]", got=repr(shape)[:80])
    done = with_shape(update, tuple(shape))
    if done.shape != tuple(shape):
        raise FormatError("the update has another shape", expected=shape, got=update.shape)
    return done


def bindings(entry: Mapping[str, Any], tensors: Mapping[str, Leaf], free: str = "") -> Iterator[dict[str, str]]:
    """Yield what the placeholders of an entry stand for, in the order of the weights; ``{free}`` is left alone.

    The first tensor that names most of them says which combinations there are.
    """
    wanted = [p for p in dict.fromkeys(_PLACE.findall(entry["name"])) if p != free]
    if not wanted:
        yield {}
        return
    named = names_in(entry.get("delta", entry.get("replace")))
    guide = max(named, key=lambda n: len(set(_PLACE.findall(n)) & set(wanted)), default="")
    words = entry.get("where", {})
    pattern = re.compile(_pattern(guide, words))
    spelled = list(dict.fromkeys(_PLACE.findall(guide)))
    rest = [p for p in wanted if p not in spelled]
    found = dict.fromkeys(
        tuple((p, m[p]) for p in spelled if p != free) for key in tensors if (m := pattern.fullmatch(key))
    )
    if any(p not in words for p in rest) or not found:
        got = f"{', '.join(rest) or guide}: no tensor says which there are"
        raise FormatError("placeholders without a meaning", parameter=entry["name"], expected="numbers in tensor names",
                          got=got)  # fmt: skip
    for combination in found:
        yield from _completed(dict(combination), rest, words)


def _completed(bound: dict[str, str], rest: list[str], words: Mapping[str, list[str]]) -> Iterator[dict[str, str]]:
    if not rest:
        yield bound
        return
    for word in words[rest[0]]:
        yield from _completed({**bound, rest[0]: word}, rest[1:], words)


def _pattern(name: str, words: Mapping[str, list[str]]) -> str:
    """Return a regular expression with a group per placeholder."""
    seen: set[str] = set()
    parts = []
    for i, part in enumerate(_PLACE.split(name)):
        if i % 2 == 0:
            parts.append(re.escape(part))
        elif part in seen:
            parts.append(f"(?P={part})")
        else:
            seen.add(part)
            choices = "|".join(map(re.escape, words[part])) if part in words else r"\d+"
            parts.append(f"(?P<{part}>{choices})")
    return "".join(parts)


def _check_where(table: Mapping[str, Any]) -> None:
    words = table.get("where", {})
    if not isinstance(words, dict) or not all(
        isinstance(said, list) and said and all(isinstance(word, str) for word in said) for said in words.values()
    ):
        raise FormatError("where lists words by placeholder", expected='{p = ["q_proj", "v_proj"]}', got=words)


def _known(said: Mapping[str, Any], words: tuple[str, ...], where: str) -> None:
    unknown = [key for key in said if key not in words]
    if unknown:
        raise FormatError(f"{where} says what nobody reads", expected=", ".join(words), got=", ".join(unknown))


def _texts(value: Any, where: str) -> list[str]:
    if not isinstance(value, list):
        raise FormatError(f"{where} is no list of names", got=repr(value)[:80])
    return [_text(one, where) for one in value]


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise FormatError(f"{where} names no tensor", got=repr(value)[:80])
    return value


FORMATS.add("manifest")(Manifest())
