"""LyCORIS' algebra of one module: LoCon, LoHa, LoKr, full differences and norms, read and written (LyCORIS 4.1).

Scale: alpha / rank, once, for LoCon, LoHa and decomposed LoKr; 1 where both factors of LoKr are full, and for
differences. OFT, BOFT, GLoRA, IA3 and T-LoRA act on the base weight: they are recognised and refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from loratools.core.update import Delta, Leaf, Update, shape_of
from loratools.errors import ConversionError, FormatError, UnsupportedError
from loratools.formats.pairs import (
    Layout,
    Parts,
    Tensor,
    alpha_tensor,
    pair,
    require,
    scale_of,
    with_magnitude,
    written_pair,
)
from loratools.kinds.dense import Dense
from loratools.kinds.dora import Dora
from loratools.kinds.hadamard import Hadamard
from loratools.kinds.kronecker import Kronecker
from loratools.kinds.lowrank import LowRank
from loratools.kinds.tucker import Tucker
from loratools.linalg.namespace import down, dtype_name, up

_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
_WHOLE = ("diff", "diff_b", "w_norm", "b_norm")
REFUSED = {
    "oft_blocks": "OFT or BOFT", "oft_diag": "OFT", "rescale": "OFT or BOFT",
    "a1.weight": "GLoRA", "a2.weight": "GLoRA",
    "b1.weight": "GLoRA", "b2.weight": "GLoRA", "bm.weight": "GLoRA", "on_input": "IA3", "q_layer.weight": "T-LoRA",
    "p_layer.weight": "T-LoRA", "lambda_layer": "T-LoRA", "lokr_t1": "LoKr with a core in its first factor",
}  # fmt: skip
PAIR = {"lora_down.weight": "a", "lora_up.weight": "b"}
SHARED = {"alpha": "alpha", "dora_scale": "magnitude"}
ROLES: Mapping[str, str] = {
    **PAIR, **SHARED, "lora_mid.weight": "core", **{leaf: leaf for leaf in (*_HADA, *_LOKR, *_WHOLE, *REFUSED)},
}  # fmt: skip
BEYOND_LORA = frozenset(ROLES) - PAIR.keys() - SHARED.keys()
LEAF_OF = {role: leaf for leaf, role in ROLES.items()}


def read(parts: Parts, stem: str, *, zero: float) -> dict[str, Update]:
    """Return the updates of one module by parameter (``weight``, ``bias``); OFT and its kin are refused."""
    for role, (key, _) in parts.items():
        if role in REFUSED:
            raise UnsupportedError(
                f"{REFUSED[role]} acts on the base weight: not read by this version", parameter=stem, got=key
            )
    found: dict[str, Update] = {}
    weight = _weight(parts, stem, zero)
    if weight is not None:
        found["weight"] = with_magnitude(weight, parts["magnitude"][1], stem) if "magnitude" in parts else weight
    for role in ("diff_b", "b_norm"):
        if role in parts:
            found["bias"] = Dense(parts[role][1])
    if not found:
        raise FormatError("a module without factors", parameter=stem, got=", ".join(key for key, _ in parts.values()))
    return found


def _weight(parts: Parts, stem: str, zero: float) -> Delta | None:
    if "a" in parts or "b" in parts:
        return pair(parts, stem, zero=zero)
    if any(role in parts for role in _HADA):
        return _hadamard(parts, stem, zero)
    if any(role in parts for role in _LOKR):
        return _kronecker(parts, stem, zero)
    whole = next((parts[role][1] for role in ("diff", "w_norm") if role in parts), None)
    return None if whole is None else Dense(whole)


def _hadamard(parts: Parts, stem: str, zero: float) -> Hadamard:
    w1a, w1b, w2a, w2b = require(parts, stem, *_HADA[:4])
    scale = scale_of(parts, w1b.shape[0], zero=zero)
    if "hada_t1" in parts:
        t1, t2 = require(parts, stem, "hada_t1", "hada_t2")
        return Hadamard(Tucker(t1, w1a.T, w1b), Tucker(t2, w2a.T, w2b), scale)
    return Hadamard(LowRank(w1a, w1b), LowRank(w2a, w2b), scale)


def _kronecker(parts: Parts, stem: str, zero: float) -> Kronecker:
    p, r1 = _half(parts, stem, "lokr_w1")
    q, r2 = _half(parts, stem, "lokr_w2")
    if r1 is not None and r2 is not None and r1 != r2:
        raise UnsupportedError("two ranks in one LoKr module: programs disagree on its scale", parameter=stem,
                               got=f"{r1} and {r2}")  # fmt: skip
    rank = r1 if r1 is not None else r2
    return Kronecker(p, q, 1.0 if rank is None else scale_of(parts, rank, zero=zero))


def _half(parts: Parts, stem: str, name: str) -> tuple[Delta, int | None]:
    """Return one factor of LoKr and its rank (None where it is full)."""
    if name in parts:
        return Dense(parts[name][1]), None
    first, second = require(parts, stem, f"{name}_a", f"{name}_b")
    if "lokr_t2" in parts and name == "lokr_w2":
        return Tucker(parts["lokr_t2"][1], first.T, second), second.shape[0]
    return LowRank(first, second), second.shape[0]


def with_shape(update: Update, shape: tuple[int, ...]) -> Update:
    """Return the update of a parameter of another shape with as many elements: a flattened kernel is unfolded."""
    if update.shape == shape:
        return update
    match update:
        case Dora():
            inner = with_shape(update.direction, shape)
            return Dora(inner, update.magnitude, update.axis, update.eps)  # type: ignore[arg-type]
        case LowRank():
            return LowRank(update.b, update.a, update.scale, shape)
        case Hadamard(LowRank() as left, LowRank() as right):
            return Hadamard(
                LowRank(left.b, left.a, left.scale, shape), LowRank(right.b, right.a, right.scale, shape), update.scale
            )
        case Kronecker(_, LowRank() as q):
            inner_shape = (q.shape[0], shape[1] // update.p.shape[1], *shape[2:])
            return Kronecker(update.p, LowRank(q.b, q.a, q.scale, inner_shape), update.scale)
    return update


def write(update: Update, parameter: str, layout: Layout) -> dict[str, Tensor]:
    """Return role -> tensor of one update; :class:`ConversionError` for a kind that LyCORIS files cannot say."""
    inner: Update = update.direction if isinstance(update, Dora) else update
    if parameter == "bias":
        return {_whole_role(layout, "diff_b", "b_norm"): whole(inner)}
    roles = _roles(inner, layout)
    if isinstance(update, Dora):
        if update.eps:
            raise ConversionError("dora_scale has no epsilon of its own", got=update.eps)
        roles["magnitude"] = _magnitude(update, layout.get("magnitude_axes", len(update.shape)))
    return roles


def _roles(u: Update, layout: Layout) -> dict[str, Tensor]:
    match u:
        case LowRank():
            return with_alpha(written_pair(u, layout.get("axes")), u, u.rank, layout)
        case Tucker():
            ones = (1,) * (len(u.shape) - 2)
            a, b = shape_of(u.a), shape_of(u.b)
            roles = {"a": u.a.reshape((*a, *ones)), "b": u.b.reshape((*b, *ones)), "core": u.core}
            return with_alpha(roles, u, a[0], layout)
        case Hadamard():
            return _hadamard_roles(u, layout)
        case Kronecker():
            return _kronecker_roles(u, layout)
        case Dense():
            stored = alpha_tensor(u, 1, layout) if "alpha" in layout else None
            return {_whole_role(layout, "diff", "w_norm"): whole(u), **({} if stored is None else {"alpha": stored})}
    raise ConversionError(f"a {u.kind} update has no place in a LyCORIS file")


def with_alpha(roles: dict[str, Tensor], u: Update, rank: int, layout: Layout) -> dict[str, Tensor]:
    """Add the alpha that says the scale of ``u``. Scale 0 is said by a zero factor: programs disagree on alpha 0."""
    alpha = alpha_tensor(u, rank, layout)
    if alpha is None:
        return roles
    if float(alpha.reshape(-1)[0]) == 0 and "alpha" not in layout:
        zeroed = next(role for role in ("b", "hada_w1_a", "lokr_w1", "lokr_w1_a") if role in roles)
        factor = roles[zeroed]
        roles = {**roles, zeroed: down(up(factor) * 0.0, dtype_name(factor))}
        alpha = alpha + rank
    return {**roles, "alpha": alpha}


def _hadamard_roles(u: Hadamard, layout: Layout) -> dict[str, Tensor]:
    (w1a, w1b, t1), (w2a, w2b, t2) = _loha_half(u.left), _loha_half(u.right)
    roles = {"hada_w1_a": w1a, "hada_w1_b": w1b, "hada_w2_a": w2a, "hada_w2_b": w2b}
    if t1 is not None and t2 is not None:
        roles |= {"hada_t1": t1, "hada_t2": t2}
    if (t1 is None) != (t2 is None) or shape_of(w1b)[0] != shape_of(w2b)[0]:
        raise ConversionError("the halves of a LoHa module must have one rank and one form")
    return with_alpha(roles, u, shape_of(w1b)[0], layout)


def _loha_half(u: Delta) -> tuple[Tensor, Tensor, Tensor | None]:
    if getattr(u, "scale", None) == 1.0:
        if isinstance(u, LowRank):
            return u.b, u.a, None
        if isinstance(u, Tucker):
            return u.b.T, u.a, u.core
    raise ConversionError(f"half of a LoHa module is a {u.kind} update with a scale of its own")


def _kronecker_roles(u: Kronecker, layout: Layout) -> dict[str, Tensor]:
    roles: dict[str, Tensor] = {}
    rank = None
    for name, half in (("lokr_w1", u.p), ("lokr_w2", u.q)):
        if getattr(half, "scale", None) != 1.0:
            raise ConversionError("a factor of a LoKr module has a scale of its own")
        match half:
            case Dense():
                roles[name] = half.d
            case LowRank():
                roles |= {f"{name}_a": half.b, f"{name}_b": half.a}
                rank = half.rank
            case Tucker():
                roles |= {f"{name}_a": half.b.T, f"{name}_b": half.a, "lokr_t2": half.core}
                rank = shape_of(half.a)[0]
    if rank is not None:
        return with_alpha(roles, u, rank, layout)
    if u.scale != 1.0:
        roles["lokr_w1"] = down(up(roles["lokr_w1"]) * u.scale, dtype_name(roles["lokr_w1"]))
    if "alpha" in layout:
        stored = alpha_tensor(u, 1, layout)
        return roles if stored is None else {**roles, "alpha": stored}
    return roles


def whole(u: Update) -> Tensor:
    """Return a full difference with its scale multiplied in."""
    if not isinstance(u, Dense):
        raise ConversionError(f"a {u.kind} update is no full difference")
    return u.d if u.scale == 1.0 else down(u.dense(), dtype_name(u.d))


def _whole_role(layout: Layout, default: str, other: str) -> str:
    return other if other in layout.get("keys", {}) else default


def _magnitude(u: Dora, axes: int) -> Tensor:
    """Return the magnitude in the shape that says its axis: (out, 1, ...) or (1, in, ...)."""
    n = math.prod(shape_of(u.magnitude))
    return u.magnitude.reshape(tuple(n if i == u.axis else 1 for i in range(axes)))


def is_lycoris(tensors: Mapping[str, Leaf]) -> bool:
    """True if a key ends in a leaf that plain LoRA files do not have."""
    return any(key.endswith(f".{leaf}") for key in tensors for leaf in BEYOND_LORA)
