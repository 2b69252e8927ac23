"""Types other than LORA: what their files have in common. A type is one file that subclasses :class:`Tuner`.

It declares the leaves of its keys and answers two questions of a module: which sizes do its tensors tell (``size``),
and how does its weight change (``weight``), both in the logical orientation (out, in) of ``y = W x``. Everything else
is done here: prefixes, wrappers and adapter names in keys, plain parameters (biases, saved modules), the shapes of the
base, and turning an update whose parameter is stored (in, out).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any, ClassVar

from loratools.core.adapter import Adapter
from loratools.core.generic import transposed
from loratools.core.update import Update
from loratools.errors import ConversionError, FormatError, MismatchError
from loratools.formats.peft.fields import Fields
from loratools.formats.peft.forms.form import Found, Remark, told
from loratools.formats.peft.lora_sort import Parts, sort_keys
from loratools.formats.peft.orientation import Orientation, by_model, contradicted, fits, orientations
from loratools.formats.peft.reading import Reading
from loratools.formats.peft.tuner_keys import parser
from loratools.formats.peft.tuner_module import Model, Module, Size
from loratools.formats.stored import EMBEDDINGS
from loratools.io.base import Base
from loratools.io.bundle import Bundle

__all__ = ["Model", "Module", "Size", "Tuner"]


class Tuner(ABC):
    """Reader of one type; ``leaves`` are those under a module, ``shared`` those under ``base_model.``.

    Segments of a leaf may hold ``*`` (see :mod:`loratools.formats.peft.tuner_keys`). ``as_stored``: the tensors have
    the orientation of the stored parameter, whichever that is. ``verbatim``: no LORA says it; unchanged, it is
    written as it was read.
    """

    type: ClassVar[str] = ""
    leaves: ClassVar[tuple[str, ...]]
    shared: ClassVar[tuple[str, ...]] = ()
    as_stored: ClassVar[bool] = False
    verbatim: ClassVar[bool] = False

    @abstractmethod
    def size(self, m: Module) -> Size:
        """Return the logical (out, in[, *kernel]) as far as the tensors of the module tell it."""

    @abstractmethod
    def weight(self, m: Module) -> Update | None:
        """Return how the weight changes, in the logical orientation, of shape ``m.shape``; None where it does not."""

    def bias(self, m: Module) -> Update | None:
        """Return how the bias changes, None where it does not."""
        return None

    def modules(
        self, modules: Mapping[str, Parts], shared: Parts, base: Base | None, fields: Fields
    ) -> Mapping[str, Parts]:
        """Return the modules by path; a type whose file does not list them says here where they are."""
        return modules

    def is_embedding(self, m: Module) -> bool:
        """Return whether the weight is that of an embedding, stored (in, out); by its name, unless tensors tell."""
        return m.path.rpartition(".")[2] in EMBEDDINGS

    def unmergeable(self, m: Module) -> str | None:
        """Return why the update cannot be added to a base weight, if so."""
        return None

    def remarks(self, model: Model) -> Iterable[Remark]:
        """Return what is worth telling of the file as a whole."""
        return ()

    def check(self, fields: Fields) -> None:
        """Raise for a config that cannot be read."""
        return

    def fork(self, keys: Iterable[str]) -> Tuner | None:
        """Return the reader of the authors' own fork of PEFT where a key tells that it wrote the file."""
        return None

    def decode(self, bundle: Bundle, *, base: Base | None = None, allow_unknown: bool = False) -> Adapter:
        """Return the adapter: every tensor is converted, carried, or refused by name."""
        if (fork := self.fork(bundle.tensors)) is not None:
            return fork.decode(bundle, base=base, allow_unknown=allow_unknown)
        config = bundle.config or {}
        fields = Fields(config)
        self.check(fields)
        found = sort_keys(bundle.tensors, parser((*self.leaves, *self.shared)), known=None)
        shared = found.modules.pop("", {})
        modules = self.modules(found.modules, shared, base, fields)
        if not modules:
            raise FormatError(f"no {self.type} tensors in this file", expected=", ".join(self.leaves or self.shared))
        plain = {name: leaf.shape for name, (_, leaf) in found.plain.items()}
        model = self._model(fields, modules, shared, base, plain)
        placed, turned = self._placed(model)
        model.placed.extend(placed)
        done = Reading(leftover=found.leftover)
        for m in placed:
            for one in self._found(m):
                done.add(m.path, m.parts, one)
        done.add_plain(found, config, allow_unknown=allow_unknown)
        remarks: list[str] = [*told([*done.remarks, *self.remarks(model)]), *found.remarks]
        remarks += [f"the adapter name {name!r} was left in the keys" for name in found.adapters]
        contradiction = contradicted(turned, fields.flag("fan_in_fan_out")) if base is not None else None
        return done.adapter(bundle, remarks if contradiction is None else [*remarks, contradiction])

    def encode(self, adapter: Adapter, *, base: Base | None = None, **options: Any) -> Any:
        """Refuse: adapters are written as LORA unless a type has a projection of its own."""
        raise ConversionError(f"no adapter is written as {self.type} by this version", hint="write it as LORA")

    def _model(
        self, fields: Fields, modules: Mapping[str, Parts], shared: Parts, base: Base | None,
        plain: Mapping[str, tuple[int, ...]],
    ) -> Model:  # fmt: skip
        if base is None:
            return Model(self.type, fields, modules, shared, None, {}, {})
        weights = [f"{path}.weight" for path in modules]
        biases = [f"{path}.bias" for path in modules]
        names = base.resolve([*weights, *biases], optional=[*biases, *(n for n in weights if n in plain)])
        stored = {name: base.shapes[target] for name, target in names.items()} | dict(plain)
        return Model(self.type, fields, modules, shared, base, names, stored)

    def _placed(self, model: Model) -> tuple[list[Module], Mapping[str, Orientation]]:
        """Return the modules with their sizes and orientations, and the orientation of matrices by path."""
        bare = [Module(path, parts, model) for path, parts in model.modules.items()]
        sizes = {m.path: self.size(m) for m in bare}
        if self.as_stored:
            return [Module(m.path, m.parts, model, sizes[m.path]) for m in bare], {}
        for path, size in sizes.items():
            _need_kernel(f"{path}.weight", size, model.stored.get(f"{path}.weight"))
        flat: dict[str, tuple[int | None, int | None]] = {
            path: (size[0], size[1])
            for path, size in sizes.items()
            if len(size) == 2 and len(model.stored.get(f"{path}.weight", size)) == 2
        }
        stored = {path: model.stored.get(f"{path}.weight") for path in flat}
        embedded = {m.path for m in bare if m.path in flat and self.is_embedding(m)
                    and ((there := stored[m.path]) is None or fits(flat[m.path][::-1], there))}  # fmt: skip
        rest = {path: size for path, size in flat.items() if path not in embedded}
        known = None if model.base is None else {path: model.stored[f"{path}.weight"] for path in rest}
        turned = orientations(rest, model.fields.flag("fan_in_fan_out"), known)
        if known is not None and model.base is not None:
            open_paths = [p for p, size in rest.items() if fits(size, known[p]) and fits(size[::-1], known[p])]
            told = {path: by_model(path, model.base.config.get("model_type")) for path in open_paths}
            turned |= {path: orientation for path, orientation in told.items() if orientation is not None}
        inner = embedded | {path for path, orientation in turned.items() if orientation == "in_out"}
        return [Module(m.path, m.parts, model, sizes[m.path], m.path in inner) for m in bare], turned

    def _found(self, m: Module) -> Iterable[Found]:
        """Yield the updates of a module as its parameters are stored."""
        try:
            update, bias = self.weight(m), self.bias(m)
        except (FormatError, MismatchError) as error:
            raise error.at(parameter=m.path) from error
        layout = {"path": m.path, "stored": "in_out" if m.turned else "out_in"}
        layout |= {"form": "embedding"} if m.turned and self.is_embedding(m) else {}
        why = self.unmergeable(m)
        if update is not None:
            yield Found(m.name, transposed(update) if m.turned else update, layout, self.verbatim, unmergeable=why)
        if bias is not None:
            yield Found(f"{m.path}.bias", bias, {"path": m.path, "stored": "lora_bias"}, self.verbatim, unmergeable=why)


def _need_kernel(name: str, size: Size, stored: tuple[int, ...] | None) -> None:
    """Raise :class:`MismatchError` where a parameter with more than two axes cannot be what the tensors tell."""
    if stored is None or (len(stored) == 2 and len(size) == 2):
        return
    flat = stored if len(size) > 2 else (stored[0], prod(stored[1:]))
    if len(flat) != len(size) or any(n is not None and n != m for n, m in zip(size, flat, strict=True)):
        raise MismatchError("the adapter does not fit the base", parameter=name, expected=stored, got=size)
