"""AdapterTune (arXiv:2603.14706): bottlenecks behind every block of a vision transformer.

``blocks.i.adapter.down.weight`` (r, d), ``down.bias`` (r,), ``up.weight`` (d, r), ``up.bias`` (d,):
x <- x + alpha (U gelu(D x + b) + u). A bottleneck is no update of a weight: its tensors are parameters that the base
lacks. They are read, told and diagnosed (the spectrum of U D), and refused where something is to be merged or written.
A linear one (``activation = "identity"``) behind a layer that ``host`` names is merged into it exactly, like Hydra's
second branch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from loratools.core.update import Leaf, Update
from loratools.formats.papers.hydra import constant
from loratools.formats.papers.system import (
    Reading,
    System,
    keyed,
    modules,
    need,
    need_axes,
    need_shape,
    of_model,
    system,
)
from loratools.kinds.dense import Dense
from loratools.kinds.lowrank import LowRank
from loratools.kinds.multiplied import Multiplied
from loratools.kinds.replace import Replace
from loratools.kinds.together import Together

_KEY = r"(?P<module>(?:.+\.)?blocks\.\d+\.adapter)\.(?P<leaf>(?:down|up)\.(?:weight|bias))"
_LEAVES = ("down.weight", "down.bias", "up.weight", "up.bias")
WHY = "a bottleneck with an activation between its factors is no update of a weight"


@system("adaptertune")
class AdapterTune(System):
    """Bottlenecks with an activation."""

    settings = ("activation", "alpha", "host")

    def claims(self, tensors: Mapping[str, Leaf]) -> bool:
        """Claim blocks.i.adapter.down.weight."""
        return any(re.fullmatch(r"(?:.+\.)?blocks\.\d+\.adapter\.down\.weight", key) for key in tensors)

    def carries(self, key: str) -> bool:
        """Carry the backbone under the wrappers, and the head."""
        return of_model(key)

    def read(self, r: Reading) -> None:
        """Add the parameters of every bottleneck, or the merged update where it is linear and its host is named."""
        found = modules(r.tensors, _KEY)
        linear = r.word("activation", ("gelu", "identity"), "gelu") == "identity" and "host" in r.settings
        hosts = {m: f"{m.removesuffix('adapter')}{r.settings['host']}" for m in found} if linear else {}
        r.place([f"{host}.weight" for host in hosts.values()], [f"{host}.bias" for host in hosts.values()])
        for module, parts in found.items():
            down, bias, up_, out = need(parts, module, *_LEAVES)
            need_axes(down, 2, module, "down.weight")
            need_shape(up_, down.shape[::-1], module, "up.weight")
            need_shape(bias, down.shape[:1], module, "down.bias")
            need_shape(out, down.shape[1:], module, "up.bias")
            if linear:
                _merged(r, hosts[module], [down, bias, up_, out], r.number("alpha", default=1.0), keyed(parts))
                continue
            for leaf, (key, tensor) in parts.items():
                r.add(f"{module}.{leaf}", Replace(tensor), {key: tensor}, why=WHY, bottleneck=module)
        if not linear:
            r.remarks.append(f"{len(found)} bottlenecks: {WHY}; they are read and diagnosed, not merged")


def _merged(r: Reading, host: str, tensors: list[Leaf], scale: float, used: dict[str, Leaf]) -> None:
    """Add W' = W + s U D W and b' = b + s (U D b + U d + u) of a linear layer that the bottleneck is behind."""
    down, bias, up_, out = tensors
    shape = r.weight(f"{host}.weight", "linear bottleneck").shape
    added = Dense(constant(up_, bias, out, scale))
    through = LowRank(up_, down, scale)
    r.add(f"{host}.weight", Multiplied(through, shape, 0), used)
    parts: tuple[Update, ...] = (added,)
    if r.shape(f"{host}.bias") is not None:
        parts = (added, Multiplied(through, out.shape, 0))
    r.add(f"{host}.bias", parts[0] if len(parts) == 1 else Together(parts), used)
