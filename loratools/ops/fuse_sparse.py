"""Several sparse adapters into one, on the union of their supports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loratools.core.adapter import Adapter
from loratools.core.update import Update
from loratools.errors import LoratoolsError, UnsupportedError, UsageError
from loratools.fusion.sparse_union import sparse_union
from loratools.kinds.sparse import Sparse
from loratools.ops.touched import forgotten


def fuse_sparse(adapters: Sequence[Adapter], *, weights: Sequence[float] | None = None, elect: bool = True) -> Adapter:
    """Return one sparse adapter: module by module the union of the supports, signs elected where they overlap.

    See :func:`loratools.fusion.sparse_union.sparse_union`. Everything else is that of the first adapter. Raises
    UsageError for a wrong number of weights, UnsupportedError naming an update that is not sparse.
    """
    chosen = [1.0] * len(adapters) if weights is None else [float(w) for w in weights]
    if not adapters or len(chosen) != len(adapters):
        raise UsageError("one weight per adapter is needed", expected=len(adapters), got=len(chosen))
    updates: dict[str, Update] = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter):
        found = [(adapter[name], w) for adapter, w in zip(adapters, chosen, strict=True) if name in adapter]
        parts = [u for u, _ in found if isinstance(u, Sparse)]
        if len(parts) < len(found):
            raise UnsupportedError("an update that is not sparse", parameter=name, hint="loratools fuse takes any")
        try:
            updates[name] = sparse_union(parts, [w for _, w in found], elect=elect)
        except LoratoolsError as error:
            raise error.at(parameter=name) from error
    first = adapters[0].meta
    meta = replace(first, metadata=forgotten(first.metadata), absorbed={}, leftover={})
    return Adapter(updates, meta).with_history(f"union of {len(adapters)} sparse adapters")
