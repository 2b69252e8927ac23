"""Convolutions: lora_A (r, in, *kernel), lora_B (out, r, 1, ...); with groups g, lora_B (out, r / g, 1, ...)."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from loratools.core.lazy import Tensor
from loratools.core.update import shape_of
from loratools.errors import FormatError, UnsupportedError
from loratools.formats.peft.forms.form import (
    BIAS,
    MAGNITUDE,
    A,
    B,
    Factored,
    Form,
    Found,
    Layout,
    Module,
    Remark,
    bias_of,
    coated,
    need_shape,
    scale_of,
)
from loratools.kinds.lowrank import LowRank
from loratools.kinds.stack import Stack

_GROUPED = (
    "PEFT's factors of a grouped convolution reach every input from every group: "
    "no update of a weight that sees only its own group"
)


class Conv(Form):
    """Conv1d, Conv2d and Conv3d, by the number of axes. Stride and padding are the base's."""

    name = "a convolution"
    may = (BIAS, MAGNITUDE)

    def claims(self, m: Module) -> bool:
        """Claim factors that both have more than two axes."""
        return A in m and B in m and len(m[A].shape) > 2 and len(m[B].shape) > 2

    def read(self, m: Module) -> Iterable[Found]:
        """Return the weight's update: one product, or one per group."""
        a, b = m[A].shape, m[B].shape
        if len(a) != len(b) or any(n != 1 for n in b[2:]) or a[0] % b[1]:
            expected = "A (r, in, *kernel) and B (out, r / groups, 1, ...)"
            raise FormatError("the factors do not multiply", parameter=m.path, expected=expected, got=f"A {a}, B {b}")
        scale, remarks = scale_of(m, a[0])
        groups = a[0] // b[1]
        if groups == 1:
            direction = LowRank(m[B].reshape(b[:2]), m[A].reshape((a[0], prod(a[1:]))), scale, (b[0], *a[1:]))
            need_shape(m, m.weight, direction.shape)
            yield Found(m.weight, coated(m, direction), {"path": m.path}, remarks=remarks)
        else:
            yield self._grouped(m, groups, scale, remarks)
        yield from bias_of(m, f"{m.path}.bias", scale)

    def _grouped(self, m: Module, groups: int, scale: float, remarks: tuple[Remark, ...]) -> Found:
        a, b = m[A].shape, m[B].shape
        if MAGNITUDE in m:
            raise UnsupportedError("DoRA on a grouped convolution: PEFT mixes up the groups", parameter=m.path)
        if b[0] % groups:
            raise FormatError("the groups do not divide the outputs", parameter=m.path, expected=groups, got=b[0])
        update = Stack(
            m[B].reshape((groups, b[0] // groups, b[1])),
            m[A].reshape((groups, b[1], prod(a[1:]))),
            scale,
            (groups, b[0] // groups, *a[1:]),
        )
        return Found(m.weight, update, {"path": m.path}, remarks=remarks, unmergeable=_GROUPED)

    def write(self, u: Factored, layout: Layout) -> dict[str, Tensor]:
        """Return the factors with the kernel in A; the groups of a stack follow each other along the first axis."""
        kernel = u.shape[1:] if isinstance(u, LowRank) else u.shape[2:]
        out, ones = prod(shape_of(u.b)[:-1]), (1,) * (len(kernel) - 1)
        height = u.rank if isinstance(u, LowRank) else u.rank * u.shape[0]
        return {A: u.a.reshape((height, *kernel)), B: u.b.reshape((out, u.rank, *ones))}

    def magnitude(self, u: Factored, magnitude: Tensor) -> Tensor:
        """Return the magnitude as (1, out, 1, ...)."""
        return magnitude.reshape((1, shape_of(magnitude)[0], *(1,) * (len(u.shape) - 2)))
