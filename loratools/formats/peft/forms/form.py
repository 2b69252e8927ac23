"""What every form of module has in common: its tensors by leaf, what is known about it, and how a reading looks.

A *form* is one way in which a LORA file changes a kind of module: the set of leaves tells it, one file here reads and
writes it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar, NamedTuple

from loratools.core.lazy import Tensor
from loratools.core.update import Leaf, Update
from loratools.errors import FormatError, MismatchError, UnsupportedError
from loratools.formats.peft.config import Settings
from loratools.formats.peft.orientation import Orientation
from loratools.kinds.dense import Dense
from loratools.kinds.dora import Dora
from loratools.kinds.lowrank import LowRank
from loratools.kinds.stack import Stack
from loratools.linalg.namespace import is_float

A, B, BIAS, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector"
Layout = Mapping[str, Any]
Factored = LowRank | Stack


@dataclass(frozen=True)
class Known:
    """What is known beside one module's own tensors.

    ``wrapped`` are the parameters that wrappers may mean, by path; ``shapes`` those of the base's parameters by the
    adapter's names (empty without a base), ``turned`` the orientation of linear modules by path; ``expert_order`` is
    how lora_B packs experts, ``order_told`` whether the caller said it.
    """

    config: Mapping[str, Any]
    said: Settings
    paths: frozenset[str]
    wrapped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    expert_order: str = "rank-major"
    order_told: bool = False
    model_type: str | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    turned: Mapping[str, Orientation] = field(default_factory=dict)


@dataclass(frozen=True)
class Module:
    """The tensors under one module path: leaf -> (key, tensor)."""

    path: str
    parts: Mapping[str, tuple[str, Leaf]]
    known: Known

    def __contains__(self, leaf: object) -> bool:
        return leaf in self.parts

    def __getitem__(self, leaf: str) -> Leaf:
        return self.parts[leaf][1]

    @property
    def weight(self) -> str:
        """Name of the module's weight."""
        return f"{self.path}.weight"


class OtherRank(NamedTuple):
    """A module whose config says another rank than its tensors have; ``other`` is the scale by the config's rank."""

    path: str
    said: int
    found: int
    scale: float
    other: float

    def __str__(self) -> str:
        return (
            f"{self.path}: the config says rank {self.said}, the tensors have {self.found}; "
            f"scale {self.scale:g} follows the tensors (the config's rank would give {self.other:g})"
        )


Remark = str | OtherRank


class Found(NamedTuple):
    """One parameter that a module changes. ``layout`` is what the writer needs to say it again.

    ``absorbed``: the update holds less than the file said, so only the file's own tensors say it again exactly.
    ``idle`` are leaves without effect, carried as they are; ``remarks`` are oddities; ``unmergeable`` is why the update
    cannot be added to a base weight.
    """

    name: str
    update: Update
    layout: Layout
    absorbed: bool = False
    idle: tuple[str, ...] = ()
    remarks: tuple[Remark, ...] = ()
    unmergeable: str | None = None


class Form(ABC):
    """One form of module. ``needs`` and ``may`` are its leaves; anything else beside them is refused by name."""

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = (A, B)
    may: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def claims(self, m: Module) -> bool:
        """Return whether the module has this form, from leaves, shapes and config."""

    def parameters(self, m: Module) -> tuple[str, ...]:
        """Return the base parameters that may be meant, for looking up their shapes."""
        return (m.weight,)

    @abstractmethod
    def read(self, m: Module) -> Iterable[Found]:
        """Return what the module changes."""

    @abstractmethod
    def write(self, u: Factored, layout: Layout) -> dict[str, Tensor]:
        """Return leaf -> tensor of an update's factors."""

    def file_scale(self, scale: float) -> float:
        """Return alpha / r of the file for an update of the given scale."""
        return scale

    def magnitude(self, u: Factored, magnitude: Tensor) -> Tensor:
        """Return a DoRA magnitude in the shape in which the file stores it."""
        return magnitude

    def magnitude_axis(self, layout: Layout) -> int:
        """Return the axis of the stored parameter on which the file's magnitudes lie."""
        return 0


def check_leaves(m: Module, form: Form) -> None:
    """Raise :class:`FormatError` for a missing half, :class:`UnsupportedError` for a leaf that the form lacks."""
    for wanted in form.needs:
        if wanted not in m:
            got = ", ".join(m.parts)
            raise FormatError("half of a factor pair is missing", parameter=m.path, expected=wanted, got=got)
    for leaf, (key, tensor) in m.parts.items():
        if leaf not in (*form.needs, *form.may):
            raise UnsupportedError(f"{leaf} on {form.name}: PEFT does not define that", parameter=m.path, got=key)
        need_elements(m.path, key, tensor)
        if not is_float(tensor.dtype):
            raise FormatError("a factor is not of a floating dtype", parameter=m.path, got=f"{key} of {tensor.dtype}",
                              hint="the file is quantised or damaged: fetch it in fp32, fp16 or bf16")  # fmt: skip


def need_elements(parameter: str, key: str, tensor: Leaf) -> None:
    """Raise :class:`FormatError` for a tensor without elements."""
    if 0 in tensor.shape:
        raise FormatError("a tensor has no elements", parameter=parameter, got=f"{key} of shape {tensor.shape}",
                          hint="the checkpoint was saved without gathering its shards; save it again")  # fmt: skip


def scale_of(m: Module, rank: int, pattern: str | None = None) -> tuple[float, tuple[Remark, ...]]:
    """Return the scale of factors of ``rank`` and remarks; ``pattern`` is the path that the config's patterns see."""
    said, path = m.known.said, pattern or m.path
    configured, alpha = said.rank_of()(path), said.alpha_of()(path)
    scale = said.scale(alpha, rank)
    if configured == rank:
        return scale, ()
    return scale, (OtherRank(path, int(configured), rank, scale, said.scale(alpha, int(configured))),)


def told(remarks: Iterable[Remark]) -> list[str]:
    """Return the remarks as text, each once, with modules of one pair of ranks in one line."""
    grouped: dict[object, list[Remark]] = {}
    for remark in remarks:
        grouped.setdefault(remark[1:3] if isinstance(remark, OtherRank) else remark, []).append(remark)
    return [str(first) if len(more) == 0 or isinstance(first, str) else f"{len(more) + 1} modules, the first {first}"
            for first, *more in grouped.values()]  # fmt: skip


def need_product(m: Module, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    """Raise :class:`FormatError` unless b (out, r) and a (r, in) multiply."""
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        expected, got = "A (r, in) and B (out, r)", f"A {a}, B {b}"
        raise FormatError("the factors do not multiply", parameter=m.path, expected=expected, got=got)


def need_shape(m: Module, name: str, shape: tuple[int, ...]) -> None:
    """Raise :class:`MismatchError` where the base is known and has the parameter in another shape."""
    stored = m.known.shapes.get(name, shape)
    if stored != shape:
        raise MismatchError("the adapter does not fit the base", parameter=name, expected=stored, got=shape)


def coated(m: Module, direction: LowRank, axis: int = 0) -> LowRank | Dora:
    """Return the direction under its magnitude, where the module has one (of any shape with as many elements)."""
    if MAGNITUDE not in m:
        return direction
    magnitude, size = m[MAGNITUDE], direction.shape[axis]
    if prod(magnitude.shape) != size or size not in magnitude.shape:
        what = "the magnitude does not fit the direction"
        raise FormatError(what, parameter=m.path, expected=f"{size} elements", got=magnitude.shape)
    return Dora(direction, magnitude.reshape((size,)), axis)


def bias_of(m: Module, name: str, scale: float, path: str | None = None) -> list[Found]:
    """Return the bias difference that ``lora_bias`` trains: lora_B's bias times the module's scale.

    Raises :class:`FormatError` for another length than lora_B's.
    """
    if BIAS not in m:
        return []
    if m[BIAS].shape != m[B].shape[:1]:
        what = "the bias does not fit lora_B"
        raise FormatError(what, parameter=m.path, expected=m[B].shape[:1], got=f"{BIAS} of shape {m[BIAS].shape}")
    layout = {"path": path or m.path, "stored": "lora_bias"}
    return [Found(name, Dense(m[BIAS], scale), layout)]
