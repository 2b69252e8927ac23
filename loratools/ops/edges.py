"""Noise edges of an adapter's modules, measured on their base."""

from __future__ import annotations

from loratools.core.adapter import Adapter
from loratools.errors import NeedsBaseError, UsageError
from loratools.io.base import Base
from loratools.linalg.noise import noise_edge
from loratools.ops.ranks import Edge

_HALF = ("bfloat16", "float16")


def noise_edges(adapter: Adapter, base: Base | None) -> Edge:
    """Return the function name -> edge of the rounding noise of the base's parameter, which is read when asked.

    An update smaller than the edge is lost when it is merged into the base, or came from such rounding when it was
    extracted. Raises :class:`NeedsBaseError` without a base, :class:`UsageError` where a parameter has no such edge.
    """
    if base is None:
        raise NeedsBaseError("the noise edge is that of the base's dtype", hint="pass --base, or another target")
    names = base.resolve([name for name, u in adapter.items() if u.kind != "replace"])
    for name, stored in names.items():
        if base.dtypes[stored] not in _HALF:
            raise UsageError(
                "a base of full precision leaves no noise edge",
                parameter=name,
                expected=" or ".join(_HALF),
                got=base.dtypes[stored],
                hint="choose another target, e.g. --energy 0.99",
            )

    def edge(name: str) -> float:
        stored = names[name]
        return noise_edge(base[stored], base.dtypes[stored])

    return edge
