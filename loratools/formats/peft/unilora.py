"""``peft_type: UNILORA``: all factors of a model out of one vector (arXiv:2506.00799, PEFT's ``UniLoraConfig``).

Every entry of A and B is an entry of ``unilora_theta_d`` over the root of how often that is used. By default a file
holds the vector alone: which modules, in which order and with which entries follows from the base, ``target_modules``
and ``proj_seed``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np

from loratools.core.lazy import Tensor, computed
from loratools.core.update import shape_of
from loratools.errors import FormatError, NeedsBaseError, UnsupportedError
from loratools.formats.peft import official
from loratools.formats.peft.config import listed
from loratools.formats.peft.fields import Fields
from loratools.formats.peft.lora_sort import Parts
from loratools.formats.peft.module_order import in_order
from loratools.formats.peft.streams import shuffled
from loratools.formats.peft.tuner import Model, Module, Size, Tuner
from loratools.formats.peft.types import peft_type
from loratools.io.base import Base
from loratools.kinds.lowrank import LowRank
from loratools.leaf import Array
from loratools.linalg.namespace import cast, namespace, up

THETA = "unilora_theta_d"
INDEX_A, INDEX_B, SCALE_A, SCALE_B = (f"unilora_{what}_{side}" for what in ("indices", "scales") for side in "AB")
_FILTERS = ("layers_to_transform", "layers_pattern")


@peft_type("UNILORA")
class UniLora(Tuner):
    """Low-rank factors out of one vector; rank at most r."""

    type = "UNILORA"
    leaves = (INDEX_A, INDEX_B, SCALE_A, SCALE_B)
    shared = (THETA,)

    def fork(self, keys: Iterable[str]) -> Tuner | None:
        """Return the reader of files whose vector has another name."""
        return official.UniLora() if any(official.BANK in key for key in keys) else None

    def modules(
        self, modules: Mapping[str, Parts], shared: Parts, base: Base | None, fields: Fields
    ) -> Mapping[str, Parts]:
        """Return the modules of the file, or those of the base that ``target_modules`` names."""
        if modules:
            return modules
        if THETA not in shared:
            raise FormatError("a tensor of this UNILORA file is missing", expected=THETA)
        if base is None:
            what = "UNILORA files without indices do not tell their modules"
            raise NeedsBaseError(what, expected="the base model, with its config.json", hint="pass --base")
        return {path: {} for path in _targeted(base, fields)}

    def size(self, m: Module) -> Size:
        """Return (out, in) where the indices are in the file."""
        return (m.index(INDEX_B).shape[0], m.index(INDEX_A).shape[1]) if m.parts else (None, None)

    def weight(self, m: Module) -> LowRank:
        """Return the gathered factors."""
        (out, n), theta = m.shape, m[THETA]
        if m.parts:
            rank = m.index(INDEX_A).shape[0]
            entries = [(m.index(INDEX_A), m.need(SCALE_A, (rank, n))), (m.index(INDEX_B), m.need(SCALE_B, (out, rank)))]
        else:
            entries = m.model.once("entries", lambda: _entries(m.model, theta.shape[0]))[m.path]
        a, b = (_gathered(theta, index, scale) for index, scale in entries)
        return LowRank(b, a)


def _gathered(theta: Tensor, index: Tensor, scale: Tensor) -> Tensor:
    def gather() -> Array:
        vector, places = up(theta), cast(index.read() if hasattr(index, "read") else index, "int64")
        return namespace(vector).take(vector, places.reshape(-1)).reshape(shape_of(index)) * up(scale)

    return computed(shape_of(index), gather)


def _targeted(base: Base, fields: Fields) -> list[str]:
    """Return the paths of matrices in the base that the config targets, as PEFT matches them."""
    told = [field for field in _FILTERS if fields.config.get(field)]
    if told:
        what = f"a UNILORA file without indices, of modules chosen by {told[0]}"
        raise UnsupportedError(what, hint="save the adapter again with save_indices=True")
    paths = [
        name.removesuffix(".weight")
        for name, shape in base.shapes.items()
        if name.endswith(".weight") and len(shape) == 2
    ]
    return [p for p in paths if _named(fields, "target_modules", p) and not _named(fields, "exclude_modules", p)]


def _named(fields: Fields, field: str, path: str) -> bool:
    said = fields.config.get(field)
    if isinstance(said, str):
        return re.fullmatch(said, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in listed(fields.config, field))


def _entries(model: Model, length: int) -> Mapping[str, list[tuple[Array, Array]]]:
    """Return path -> (index, scale) of A and of B: shuffled numbers, dealt out module by module."""
    rank, modules = model.fields.integer("r", least=1), {m.path: m for m in model.placed}
    shapes = {path: m.shape for path, m in modules.items()}
    total = sum(rank * (out + n) for out, n in shapes.values())
    dealt = shuffled(length, total, model.fields.integer("proj_seed"))
    counts = np.bincount(dealt, minlength=length)
    scales = np.where(counts > 0, 1.0 / np.sqrt(np.maximum(counts, 1), dtype=np.float32), 0.0).astype(np.float32)
    found, start = {}, 0
    for path in in_order(shapes, model.base, model.names, model.type):
        out, n = shapes[path]
        parts = []
        for shape in ((rank, n), (out, rank)):
            index = dealt[start : start + shape[0] * shape[1]].reshape(shape)
            parts.append((index, modules[path].as_held(scales[index])))
            start += index.size
        found[path] = parts
    return found
