"""Sparse adapters on and off on tensors in memory: the rules of :mod:`loratools.ops.switch`, without a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from loratools.core.adapter import Adapter
from loratools.core.update import Array
from loratools.errors import UsageError
from loratools.io.base import Base
from loratools.kinds.sparse import Sparse
from loratools.linalg.namespace import placed_like
from loratools.ops.switch import listed_id
from loratools.ops.switch_records import Record, check_untouched, given, recorded, write


class Switchboard:
    """Sparse adapters on tensors in memory: the same rules as :func:`switch`, in place, on NumPy or torch.

    ``tensors``: parameter name -> contiguous array or tensor (a state dict). ``put_on`` and ``take_off`` write only the
    entries of the adapters; with everything off the tensors have their old bits.
    """

    def __init__(self, tensors: Mapping[str, Array]) -> None:
        self._store = _Memory(tensors)
        self._model = Base.open(dict(tensors))
        self._on: dict[str, Record] = {}

    @property
    def on(self) -> tuple[str, ...]:
        """Labels of the adapters that are on."""
        return tuple(record.label for record in self._on.values())

    def put_on(self, adapter: Adapter) -> None:
        """Put an adapter on. Raises as :func:`switch`, before anything is written."""
        one = given(adapter, self._model)
        present = list(self._on.values())
        if one.id in self._on:
            raise UsageError("this adapter is on already", got=one.label)
        record = recorded(one._replace(adapter=self._placed(one.adapter)), self._model, self._store, present)
        check_untouched(self._model, self._store, present)
        self._store.check_writable(record.updates)
        write(self._store, list(record.updates), present, [*present, record])
        self._on[one.id] = record

    def take_off(self, adapter: Adapter) -> None:
        """Take an adapter off. Raises MismatchError where it is not on, or the tensors were changed since."""
        id = listed_id(given(adapter, self._model), {i: r.label for i, r in self._on.items()}, self._model)
        present = list(self._on.values())
        check_untouched(self._model, self._store, present)
        record = self._on[id]
        self._store.check_writable(record.updates)
        write(self._store, list(record.updates), present, [r for i, r in self._on.items() if i != id])
        del self._on[id]

    def _placed(self, adapter: Adapter) -> Adapter:
        """Return the adapter in the library and on the device of the tensors it is for."""
        names = self._model.resolve(adapter)
        return replace(adapter, updates={n: self._store.placed(names[n], u) for n, u in adapter.items()})  # type: ignore[arg-type]


class _Memory:
    """Elements of tensors in memory, through flat views."""

    def __init__(self, tensors: Mapping[str, Array]) -> None:
        self._tensors = {name: t.detach() if hasattr(t, "detach") else t for name, t in tensors.items()}

    def _view(self, name: str) -> Array:
        whole = self._tensors[name]
        flat = whole.reshape(-1)
        if flat.shape[0] and _address(flat) != _address(whole):
            raise UsageError("a tensor that is not contiguous is not switched in place", got=name)
        return flat

    def read(self, name: str, flat: Array) -> Array:
        return self._view(name)[flat]

    def write(self, name: str, flat: Array, values: Array) -> None:
        self._view(name)[flat] = values

    def check_writable(self, names: Iterable[str]) -> None:
        """Raise UsageError for a read-only array: nothing may be written before everything can be."""
        for name in names:
            flags = getattr(self._view(name), "flags", None)
            if flags is not None and not flags.writeable:
                raise UsageError("a read-only array is not switched in place", got=name, hint="pass a copy of it")

    def placed(self, name: str, u: Sparse) -> Sparse:
        like = self._tensors[name]
        fields = {f: getattr(u, f) for f in ("rows", "columns", "values", "base")}
        return replace(u, **{f: placed_like(t, like) for f, t in fields.items() if t is not None})


def _address(x: Array) -> int:
    """Return where the elements of an array begin in memory."""
    return int(x.data_ptr() if hasattr(x, "data_ptr") else x.ctypes.data)
