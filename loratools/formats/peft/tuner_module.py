"""What a reader of a type sees: the model's file as a whole, and one module of it, with what the base says of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

from loratools.core.update import Leaf
from loratools.errors import FormatError, MissingScaleError, NeedsBaseError
from loratools.formats.peft.fields import Fields
from loratools.formats.peft.forms.form import need_elements
from loratools.formats.peft.lora_sort import Parts
from loratools.io.base import Base
from loratools.leaf import Array
from loratools.linalg.namespace import down, is_float, up

Size = tuple[int | None, ...]  # (out, in[, *kernel]); None where the tensors do not tell


@dataclass(frozen=True, eq=False)
class Model:
    """What all modules of a file share: its config, the tensors at ``base_model.``, and the base where there is one.

    ``stored`` are the base's shapes by the adapter's names, ``names`` the base's names by the adapter's; ``placed`` are
    the modules with their sizes; ``kept`` holds what a type computes once for all modules.
    """

    type: str
    fields: Fields
    modules: Mapping[str, Parts]
    shared: Parts
    base: Base | None
    names: Mapping[str, str]
    stored: Mapping[str, tuple[int, ...]]
    placed: list[Module] = field(default_factory=list)
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def largest(self) -> tuple[int, int]:
        """The largest out and the largest in among the modules."""
        shapes = [m.shape for m in self.placed]
        return max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return ``compute()``, computed for the first module that asks."""
        if name not in self.kept:
            self.kept[name] = compute()
        return self.kept[name]


@dataclass(frozen=True, eq=False)
class Module:
    """The tensors of one module, by leaf: ``m["hada_w1_a"]``; those of the whole model are found by their leaf, too."""

    path: str
    parts: Parts
    model: Model
    size: Size = (None, None)
    turned: bool = False

    def __contains__(self, leaf: object) -> bool:
        return leaf in self.parts or leaf in self.model.shared

    def __getitem__(self, leaf: str) -> Leaf:
        """Return a tensor of a floating dtype; :class:`FormatError` names one that is missing."""
        key, tensor = self._part(leaf)
        if not is_float(tensor.dtype):
            got, hint = f"{key} of {tensor.dtype}", "the file is quantised or damaged: fetch it in fp32, fp16 or bf16"
            raise FormatError("a factor is not of a floating dtype", parameter=self.path, got=got, hint=hint)
        return tensor

    def index(self, leaf: str) -> Leaf:
        """Return a tensor of indices, whatever its dtype."""
        return self._part(leaf)[1]

    def _part(self, leaf: str) -> tuple[str, Leaf]:
        parts = self.parts if leaf in self.parts else self.model.shared
        if leaf not in parts:
            raise FormatError(
                f"a tensor of this {self.model.type} module is missing", parameter=self.path, expected=leaf,
                got=", ".join(self.parts),
            )  # fmt: skip
        need_elements(self.path, *parts[leaf])
        return parts[leaf]

    @property
    def fields(self) -> Fields:
        """The config."""
        return self.model.fields

    @property
    def name(self) -> str:
        """Name of the module's weight."""
        return f"{self.path}.weight"

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """(out, in[, *kernel]): from the tensors, else from the base's header; :class:`NeedsBaseError` without it."""
        stored = self.model.stored.get(self.name)
        if stored is not None:
            return stored[::-1] if self.turned else stored
        if None in self.size:
            raise NeedsBaseError(
                f"{self.model.type} files do not tell the shape of the weight",
                expected="the base's shapes (its header is enough)",
                hint="pass --base",
            ).at(parameter=self.name)
        return tuple(n for n in self.size if n is not None)

    @property
    def bias_shape(self) -> tuple[int, ...] | None:
        """Shape of the module's bias in the base; None where it has none, or no base says."""
        return self.model.stored.get(f"{self.path}.bias")

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, product of the rest) of the shape."""
        return self.shape[0], prod(self.shape[1:])

    def kernel(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        """Return the kernel of a core's trailing ``axes``: PEFT gives that of a Conv1d a second axis of 1."""
        line = len(self.model.stored.get(self.name, ())) == 3 and axes[1:] == (1,)
        return axes[:1] if line else axes

    def rank(self, field: str = "r") -> int:
        """Return the config's rank of the module: that of ``rank_pattern``, or the field's."""
        return int(self.fields.matched("rank_pattern", self.path, self.fields.integer(field, least=1)))

    def scale(self, rank: int, alpha: str = "alpha") -> float:
        """Return alpha / rank, the alpha from ``alpha_pattern`` or the config's field."""
        value = self.fields.number(alpha) if alpha in self.fields.config else None
        if value is None:
            expected = f"{alpha}, a number"
            raise MissingScaleError(f"adapter_config.json does not say {alpha}", expected=expected)
        return self.fields.matched("alpha_pattern", self.path, value) / rank

    def base_leaf(self, leaf: str = "weight") -> Leaf:
        """Return the handle of a parameter of the base, as it is stored; :class:`NeedsBaseError` without a base."""
        name = f"{self.path}.{leaf}"
        if self.model.base is None or name not in self.model.names:
            raise NeedsBaseError(
                f"a {self.model.type} update depends on the values of its base", hint="pass --base"
            ).at(parameter=name)
        return self.model.base.leaf(self.model.names[name])

    def axes(self, leaf: str, count: int) -> tuple[int, ...]:
        """Return the shape of a tensor, or raise :class:`FormatError` where it has not ``count`` axes."""
        shape = self[leaf].shape
        if len(shape) != count:
            raise FormatError(f"{leaf} has another shape", parameter=self.path, expected=f"{count} axes", got=shape)
        return shape

    def as_held(self, x: Array) -> Array:
        """Return drawn numbers as PEFT holds them: rounded to the dtype of the base's weight, where that is half."""
        base, name = self.model.base, self.model.names.get(self.name)
        dtype = "float32" if base is None or name is None else base.dtypes[name]
        return up(down(x, dtype)) if dtype in ("float16", "bfloat16") else x

    def need(self, leaf: str, shape: tuple[int, ...]) -> Leaf:
        """Return a tensor, or raise :class:`FormatError` where it has another shape."""
        tensor = self[leaf]
        if tensor.shape != shape:
            raise FormatError(f"{leaf} has another shape", parameter=self.path, expected=shape, got=tensor.shape)
        return tensor
