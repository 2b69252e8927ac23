"""Parametrisations of a linear layer that are a plain pair of factors once something is multiplied in.

| what | in the file | pair |
|---|---|---|
| KaSA (arXiv:2412.06071) | lora_diag d (r) | B, diag(d) A |
| LoRA-XS, LoRA-SB (arXiv:2405.17604, 2411.19557) | lora_latent_mapping R (r, r) | B R, A |
| BD-LoRA | B (out, r / n) or A (r, in / n) | the blocks on a diagonal |
| QALoRA (arXiv:2309.14717) | A (r, in / g) | B, each column of A repeated g times; scale (in / g) / g |
| MergedLinear (PEFT before 0.3) | A (n r, in), B (n out / m, r, 1) | blocks of n enabled parts of m, zeros elsewhere |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from loratools.core.lazy import block_diagonal, lazily, repeated
from loratools.core.update import Array, Leaf, namespace
from loratools.errors import FormatError, MismatchError, UnsupportedError
from loratools.formats.peft.forms.form import A, B, Module
from loratools.linalg.namespace import down, up, working_dtype

DIAGONAL, LATENT = "lora_diag", "lora_latent_mapping.weight"


class Factors(NamedTuple):
    """b, a and what the scale is to be multiplied with; ``rank`` is that of the scale where it is not a's height."""

    b: Any
    a: Any
    times: float = 1.0
    rank: int | None = None
    absorbed: bool = False


class Parametrisation(NamedTuple):
    """When a module has it, and how it becomes a pair; ``leaves`` are those it adds."""

    applies: Callable[[Module], bool]
    absorb: Callable[[Module, Factors], Factors]
    leaves: tuple[str, ...] = ()


def _product(x: Leaf, y: Leaf, shape: tuple[int, ...], multiply: Callable[[Array, Array], Array]) -> Leaf:
    """Return ``multiply(x, y)`` computed at least in fp32 and stored in the dtype of ``x``, when it is read."""
    dtype = working_dtype(x, y)
    return Leaf(shape, x.dtype, lambda out: down(multiply(up(x, dtype), up(y, dtype)), x.dtype))


def _kasa(m: Module, f: Factors) -> Factors:
    d = m[DIAGONAL]
    if d.shape != f.a.shape[:1]:
        raise FormatError("KaSA's diagonal does not fit", parameter=m.path, expected=f.a.shape[:1], got=d.shape)
    return f._replace(a=_product(f.a, d, f.a.shape, lambda a, x: x[:, None] * a))


def _latent(m: Module, f: Factors) -> Factors:
    core, r = m[LATENT], f.a.shape[0]
    if core.shape != (r, r) or f.b.shape[1:] != (r,):
        raise FormatError("the core of LoRA-XS does not fit", parameter=m.path, expected=(r, r), got=core.shape)
    return f._replace(b=_product(f.b, core, f.b.shape, lambda b, x: b @ x))


def _bd_side(m: Module) -> str | None:
    """Return which factor the config says is blockwise, as PEFT matches it: a part of the path's text."""
    said = m.known.config.get("use_bdlora")
    if not isinstance(said, Mapping):
        return None
    sides = {side: said.get(f"target_modules_bd_{side}") or () for side in ("a", "b")}
    found = [side for side, patterns in sides.items() if any(str(p) in m.path for p in patterns)]
    if len(found) > 1:
        raise FormatError("use_bdlora names both factors of a module", parameter=m.path, got=sides)
    return found[0] if found else None


def _bd(m: Module, f: Factors) -> Factors:
    side = _bd_side(m)
    blocks = m.known.config["use_bdlora"].get("nblocks", 1)
    factor = f.a if side == "a" else f.b
    if not isinstance(blocks, int) or blocks < 1 or factor.shape[0] % blocks:
        raise FormatError("use_bdlora: nblocks does not divide", parameter=m.path, expected=factor.shape[0], got=blocks)
    spread = block_diagonal(factor, blocks)
    return f._replace(a=spread) if side == "a" else f._replace(b=spread)


def may_be_pooled(m: Module) -> bool:
    """True where only the base can tell whether the inputs of A are groups: PEFT pools them on GPTQ layers alone."""
    return bool(m.known.config.get("use_qalora")) and m.weight not in m.known.shapes


def _pooled(m: Module) -> bool:
    return bool(m.known.config.get("use_qalora")) and not may_be_pooled(m) and _input_width(m) != m[A].shape[1]


def _input_width(m: Module) -> int:
    """Return the base's number of inputs: its shape without the side of the outputs."""
    stored, out = m.known.shapes[m.weight], m[B].shape[0]
    return stored[1] if stored[0] == out else stored[0]


def _qalora(m: Module, f: Factors) -> Factors:
    size, width, groups = m.known.config.get("qalora_group_size", 16), _input_width(m), f.a.shape[1]
    if not isinstance(size, int) or size < 1 or groups * size != width:
        got = f"{groups} groups of {size}"
        raise MismatchError("QALoRA's groups do not fit the base", parameter=m.path, expected=width, got=got)
    return f._replace(a=repeated(f.a, size), times=groups / size)


def _merged(m: Module, f: Factors) -> Factors:
    enabled = m.known.config.get("enable_lora")
    if not isinstance(enabled, list) or not any(enabled) or not all(isinstance(on, bool) for on in enabled):
        raise UnsupportedError(
            "a grouped (MergedLinear) factor, and no enable_lora in the config",
            parameter=m.path,
            expected="enable_lora, a list like [true, false, true]",
            got=f"A {f.a.shape}, B {f.b.shape}",
        )
    parts, (rows, r, one) = sum(enabled), f.b.shape
    if one != 1 or rows % parts or f.a.shape[0] != parts * r:
        expected = f"A ({parts} r, in) and B (out, r, 1)"
        raise FormatError("grouped factors do not fit enable_lora", parameter=m.path, expected=expected,
                          got=f"A {f.a.shape}, B {f.b.shape}")  # fmt: skip
    size = rows // parts
    spread = block_diagonal(f.b.reshape((rows, r)), parts)
    return f._replace(b=_with_gaps(spread, enabled, size), rank=r)


def _with_gaps(b: Any, enabled: list[bool], size: int) -> Any:
    """Return b with ``size`` zero rows for every part that is not enabled."""

    def place(x: Array) -> Array:
        xp = namespace(x)
        gap, at, out = xp.zeros((size, x.shape[1]), dtype=x.dtype, device=x.device), 0, []
        for on in enabled:
            out.append(x[at : at + size, :] if on else gap)
            at += size * on
        return xp.concat(out)

    return lazily(b, (size * len(enabled), b.shape[1]), place)


PARAMETRISATIONS: tuple[Parametrisation, ...] = (
    Parametrisation(lambda m: len(m[B].shape) == 3 and len(m[A].shape) == 2, _merged),
    Parametrisation(lambda m: _bd_side(m) is not None, _bd),
    Parametrisation(_pooled, _qalora),
    Parametrisation(lambda m: DIAGONAL in m, _kasa, (DIAGONAL,)),
    Parametrisation(lambda m: LATENT in m, _latent, (LATENT,)),
)
