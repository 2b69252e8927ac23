"""Hydra (arXiv:2309.06922): a branch beside a linear layer and one behind it, both linear, both merged into it.

y = W x + b + s (U_p (D_p x + d_p) + u_p) + s (U_s (D_s (W x + b) + d_s) + u_s), so
W' = W + s U_p D_p + s U_s D_s W and b' = b + s (U_p d_p + u_p + U_s (D_s b + d_s) + u_s).

| layout | keys | layer | s |
|---|---|---|---|
| timm | ``mlp.hydra_mlp_par.down_proj.weight``, ``attn.hydra_proj_seq.up_proj.bias`` | fc2, attn.proj | ``scale`` |
| CLIP | ``X.adapter_par.down_proj.weight``, ... beside ``X.linear`` | ``host`` | ``X.adapter_par.scale``, ``scale`` |
| NLU | ``X.hydra_A.weight``, ``X.hydra_B.weight``, no biases | ``hosts`` | 1 |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from loratools.core.update import Delta, Leaf, Update
from loratools.errors import FormatError, UnsupportedError
from loratools.formats.matrices import made
from loratools.formats.pairs import number
from loratools.formats.papers.system import Reading, System, keyed, modules, need, need_shape, of_model, system
from loratools.kinds.dense import Dense
from loratools.kinds.lowrank import LowRank
from loratools.kinds.multiplied import Multiplied
from loratools.kinds.together import Together

_TIMM = r"(?P<module>.+\.hydra_(?:mlp|proj)_(?:par|seq))\.(?P<leaf>(?:down|up)_proj\.(?:weight|bias)|scale)"
_CLIP = r"(?P<module>.+\.adapter_(?:par|seq))\.(?P<leaf>(?:down|up)_proj\.(?:weight|bias)|scale)"
_NLU = r"(?P<module>.+)\.hydra_(?P<leaf>[AB]\.weight)"
Branch = Mapping[str, tuple[str, Leaf]]


@system("hydra")
class Hydra(System):
    """Parallel and sequential branches of linear layers."""

    settings = ("scale", "host", "hosts")

    def claims(self, tensors: Mapping[str, Leaf]) -> bool:
        """Claim the branches of any layout."""
        return any(re.fullmatch(pattern, key) for key in tensors for pattern in (_TIMM, _CLIP, _NLU))

    def carries(self, key: str) -> bool:
        """Carry the frozen model and its head, where they are saved, too."""
        return of_model(key) and not any(re.fullmatch(pattern, key) for pattern in (_TIMM, _CLIP, _NLU))

    def read(self, r: Reading) -> None:
        """Add the change of every wrapped weight, and of its bias."""
        hosts: dict[str, dict[str, Branch]] = {}
        for pattern in (_TIMM, _CLIP, _NLU):
            for module, parts in modules(r.tensors, pattern).items():
                host, side = _place(module, pattern, r)
                if side in hosts.setdefault(host, {}):
                    raise FormatError("two branches of one side on a layer", parameter=host, got=module)
                hosts[host][side] = parts
        r.place([f"{host}.weight" for host in hosts], [f"{host}.bias" for host in hosts])
        for host, sides in hosts.items():
            self._add(r, host, sides)

    def _add(self, r: Reading, host: str, sides: Mapping[str, Branch]) -> None:
        weights: list[Update] = []
        constants: list[Leaf] = []
        through: Delta | None = None
        used: dict[str, Leaf] = {}
        shape = _shape(r, host, sides)
        for side, parts in sides.items():
            s, down, up_, d, u = _branch(r, host, parts)
            used |= keyed(parts)
            if side == "par":
                weights.append(LowRank(up_, down, s))
            else:
                through = LowRank(up_, down, s)
                weights.append(Multiplied(through, shape, 0))
            if d is not None and u is not None:
                constants.append(constant(up_, d, u, s))
        if any(w.shape != shape for w in weights):
            got = ", ".join(str(w.shape) for w in weights)
            raise FormatError("the branches do not fit one layer", parameter=host, expected=shape, got=got)
        r.add(f"{host}.weight", weights[0] if len(weights) == 1 else Together(tuple(weights)), used)
        bias = _bias(shape[0], constants, through, r.shape(f"{host}.bias") is not None)
        if bias is not None:
            r.add(f"{host}.bias", bias, used)


def constant(up_: Leaf, inner: Leaf, outer: Leaf, scale: float) -> Leaf:
    """Return s (U d + u), computed when it is read."""
    return made(outer.shape, [up_, inner, outer], lambda m, v, c: scale * (m @ v + c))


def _place(module: str, pattern: str, r: Reading) -> tuple[str, str]:
    """Return the wrapped layer of a branch, and on which side of it the branch is."""
    parent, _, last = module.rpartition(".")
    if pattern == _NLU:
        told: Any = r.settings.get("hosts", {})
        said = told.get(last) if isinstance(told, dict) else None
        if not isinstance(said, list) or len(said) != 2 or said[1] not in ("par", "seq"):
            expected = f'settings = {{hosts = {{{last} = ["LAYER", "par" or "seq"]}}}} in a manifest'
            raise UnsupportedError("no file says which layer this branch wraps", parameter=module, expected=expected)
        return (f"{parent}.{said[0]}" if parent else str(said[0])), said[1]
    side = last[-3:]
    if pattern == _CLIP:
        host = r.settings.get("host")
        if not isinstance(host, str):
            expected = 'settings = {host = "c_proj"} in a manifest: the layer that its wrapper replaced'
            raise UnsupportedError("no file says what the base calls this layer", parameter=module, expected=expected)
        return f"{parent.rpartition('.')[0]}.{host}", side
    return f"{parent}.{'fc2' if last.startswith('hydra_mlp') else 'proj'}", side


def _branch(r: Reading, host: str, parts: Branch) -> tuple[float, Leaf, Leaf, Leaf | None, Leaf | None]:
    """Return s, D (r, in), U (out, r), d (r,) and u (out,)."""
    if "A.weight" in parts or "B.weight" in parts:
        down, up_ = need(parts, host, "A.weight", "B.weight")
        return 1.0, down, up_, None, None
    down, d, up_, u = need(parts, host, "down_proj.weight", "down_proj.bias", "up_proj.weight", "up_proj.bias")
    need_shape(d, down.shape[:1], host, "down_proj.bias")
    need_shape(u, up_.shape[:1], host, "up_proj.bias")
    return (number(parts["scale"][1]) if "scale" in parts else r.number("scale")), down, up_, d, u


def _shape(r: Reading, host: str, sides: Mapping[str, Branch]) -> tuple[int, ...]:
    """Return the shape of the wrapped weight: a branch behind it does not tell its inputs."""
    stored = r.shape(f"{host}.weight")
    if stored is not None:
        return stored
    if "par" not in sides:
        return r.weight(f"{host}.weight", "Hydra").shape
    _, down, up_, _, _ = _branch(r, host, sides["par"])
    return up_.shape[0], down.shape[1]


def _bias(out: int, constants: list[Leaf], through: Delta | None, has_bias: bool) -> Update | None:
    """Return how the bias changes: by a constant, and where a branch is behind the layer, by its own image, too."""
    parts: list[Update] = []
    if constants:
        parts.append(Dense(made((out,), constants, lambda *xs: sum(xs[1:], xs[0]))))
    if through is not None and (has_bias or not constants):
        parts.append(Multiplied(through, (out,), 0))
    if not constants and not has_bias:
        return None
    return parts[0] if len(parts) == 1 else Together(tuple(parts))
