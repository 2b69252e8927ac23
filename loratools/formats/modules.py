"""From sorted modules to an Adapter: what every format of named modules does after its grammar has been read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from loratools.core import generic
from loratools.core.adapter import Adapter, Meta
from loratools.core.update import Leaf, Update
from loratools.errors import ConversionError, FormatError, MismatchError, UsageError
from loratools.formats.algebra import with_shape
from loratools.formats.metadata import HISTORY, history_of
from loratools.formats.pairs import Parts, layout_of
from loratools.formats.spaces import worlds
from loratools.formats.stored import CONV1D
from loratools.io.base import Base
from loratools.io.bundle import Bundle
from loratools.kinds.dora import Dora
from loratools.kinds.lowrank import LowRank


@dataclass
class Found:
    """What a decoder collects: updates and layouts by parameter name, what is carried, what is odd."""

    updates: dict[str, Update] = field(default_factory=dict)
    layout: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    leftover: dict[str, Leaf] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def add(self, name: str, update: Update, parts: Parts, **more: Any) -> None:
        """Add one update; two modules of one parameter are an error."""
        if name in self.updates:
            raise FormatError("two modules of the file are one parameter", parameter=name)
        self.updates[name] = update
        self.layout[name] = {**layout_of(parts, update), **more}

    def rest(
        self, tensors: Mapping[str, Leaf], *, allow_unknown: bool, known: Callable[[str], bool] | None = None
    ) -> None:
        """Carry tensors outside all modules: known extras always, others only if the user says so."""
        unknown = [key for key in tensors if not (known and known(key))]
        if unknown and not allow_unknown:
            raise FormatError(
                f"{len(unknown)} tensors that the format does not explain",
                got=", ".join(unknown[:3]),
                hint="--allow-unknown carries them through untouched",
            )
        self.leftover |= tensors
        self.remarks += [f"{key}: carried untouched" for key in list(tensors)[:3]]
        if len(tensors) > 3:
            self.remarks.append(f"... and {len(tensors) - 3} more tensors carried untouched")

    def adapter(self, bundle: Bundle, format: str, base: Base | None, **meta: Any) -> Adapter:
        """Return the adapter; with a base, shapes and orientations are those of its parameters."""
        if not self.updates:
            raise FormatError("no factors in this file")
        said = {
            "namespace": worlds(self.updates),
            "config": bundle.config or {},
            "metadata": {k: v for k, v in bundle.metadata.items() if k != HISTORY},
            "history": history_of(bundle.metadata),
        } | meta
        done = Adapter(
            self.updates,
            Meta(
                format=format, layout=self.layout, leftover=self.leftover, remarks=tuple(self.remarks),
                path=bundle.path, siblings=bundle.siblings, readme=bundle.readme, **said,
            ),
        )  # fmt: skip
        return done if base is None else settled(done, base)


def settled(adapter: Adapter, base: Base) -> Adapter:
    """Return the adapter with every update in the shape and orientation of the base's parameter.

    Kernels that a file stores flat are unfolded; parameters stored (in, out) turn their updates, square ones as their
    siblings do (or as the base's model type does). Names that the base lacks stay as they are: a file may act on more
    than one model. Raises :class:`MismatchError` where a shape fits in no way.
    """
    names = base.resolve(adapter, optional=adapter)
    shapes = {name: base.shapes[target] for name, target in names.items()}
    turned = {name for name, shape in shapes.items() if _turned(name, adapter[name], shape)}
    if turned or base.config.get("model_type") in CONV1D:
        kinds = {_type(name) for name in turned}
        squares = [n for n, s in shapes.items() if n not in turned and _square(adapter[n], s) and n.endswith(".weight")]
        turned |= {n for n in squares if _type(n) in kinds or base.config.get("model_type") in CONV1D}
    updates = {n: _fitted(n, u, shapes.get(n), n in turned) for n, u in adapter.items()}
    layout = {n: {**e, "stored": "in_out"} if n in turned else e for n, e in adapter.meta.layout.items()}
    return replace(adapter, updates=updates, meta=replace(adapter.meta, layout=layout))


def _square(u: Update, shape: tuple[int, ...]) -> bool:
    return u.shape == shape and len(shape) == 2 and shape[0] == shape[1]


def _turned(name: str, u: Update, shape: tuple[int, ...]) -> bool:
    return u.shape != shape and u.shape == shape[::-1] and len(shape) == 2


def _type(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _fitted(name: str, u: Update, shape: tuple[int, ...] | None, turned: bool) -> Update:
    if shape is None:
        return u
    if turned:
        return transposed(name, u)
    done = with_shape(u, shape)
    if done.shape != shape:
        raise MismatchError("the adapter does not fit the base", parameter=name, expected=shape, got=u.shape)
    return done


def transposed(name: str, u: Update) -> Update:
    """Return the update of the transposed parameter."""
    if isinstance(u, LowRank):
        return LowRank(u.a.T, u.b.T, u.scale)
    if isinstance(u, Dora) and isinstance(u.direction, LowRank):
        direction = LowRank(u.direction.a.T, u.direction.b.T, u.direction.scale)
        return Dora(direction, u.magnitude, 1 - u.axis, u.eps)
    try:
        return generic.transposed(u)
    except ConversionError:
        what = f"a {u.kind} update of a parameter that the base stores (in, out)"
        raise MismatchError(what, parameter=name) from None


def check_kinds(adapter: Adapter, accepts: tuple[type[Update], ...], format: str) -> None:
    """Raise ConversionError for an update, or a coat's direction, of a kind that the format cannot say."""
    for name, u in adapter.items():
        for part in (u, u.direction) if isinstance(u, Dora) else (u,):
            if not isinstance(part, accepts):
                raise ConversionError(
                    f"a {part.kind} update has no place in a {format} file",
                    parameter=name,
                    expected=", ".join(kind.kind for kind in accepts),
                    hint="loratools convert finds the way there, if there is one",
                )


def refuse_options(format: str, options: Mapping[str, Any]) -> None:
    """Raise UsageError for options that a writer does not have."""
    if options:
        raise UsageError(f"the {format} format has no such option", got=", ".join(options))
