"""dequantize: a quantised adapter as plain factors again."""

from __future__ import annotations

from dataclasses import replace

from loratools.core.adapter import Adapter
from loratools.core.pool import keep_freed_memory, parallel_map
from loratools.core.update import Leaf, Update, nbytes
from loratools.errors import LoratoolsError, UsageError
from loratools.kinds.coded import Coded
from loratools.kinds.lowrank import LowRank, low_rank, stored_as, with_low_rank
from loratools.report import Report


def dequantize(adapter: Adapter, *, dtype: str = "float16") -> Adapter:
    """Return the adapter with every packed update unpacked into plain factors of ``dtype``, ready for any program."""
    keep_freed_memory()
    found = [name for name, u in adapter.items() if _is_packed(u)]
    if not found:
        raise UsageError("nothing in this adapter is quantised", file=adapter.meta.path)

    def one(name: str) -> Update:
        try:
            return _plain(adapter[name], dtype)
        except LoratoolsError as error:
            raise error.at(file=adapter.meta.path, parameter=name) from error

    plain = dict(zip(found, parallel_map(one, found, weights=[_plain_bytes(adapter[n]) for n in found]), strict=True))
    updates = {name: plain.get(name, u) for name, u in adapter.items()}
    done = replace(adapter, updates=updates, report=None).with_history(f"dequantize to {dtype}")
    rows = [
        {"name": n, "kind": done[n].kind, "bytes_before": nbytes(adapter[n]), "bytes_after": nbytes(done[n])}
        for n in found
    ]
    total = {"modules": len(found), "bytes_before": adapter.nbytes, "bytes_after": done.nbytes}
    units = {"bytes_before": "bytes of the packed tensors", "bytes_after": "bytes of the written tensors"}
    return replace(done, report=Report("loratools.dequantize/1", tuple(rows), total, units))


def _plain_bytes(u: Update) -> int:
    """Return the bytes of the unpacked factors in fp32: codes say little of the work."""
    low = low_rank(u)
    assert low is not None  # what was packed has factors
    return nbytes(low)


def _plain(u: Update, dtype: str) -> Update:
    """Return a packed update, or a coat around one, with plain factors in memory."""
    inner = _inner(u)
    if inner is not None:
        low = low_rank(_plain(inner, dtype))
        assert low is not None  # what was packed has factors
        return with_low_rank(u, low)
    assert isinstance(u, Coded)
    low = u.unpacked(dtype)
    b, a = (t.read() if isinstance(t, Leaf) else t for t in (low.b, low.a))
    return LowRank(stored_as(b, dtype), stored_as(a, dtype), low.scale, low.shape)


def _inner(u: Update) -> Update | None:
    found = getattr(u, "direction", None) or getattr(u, "update", None)
    return found if isinstance(found, Update) else None


def _is_packed(u: Update) -> bool:
    inner = _inner(u)
    return isinstance(u, Coded) or (inner is not None and _is_packed(inner))
