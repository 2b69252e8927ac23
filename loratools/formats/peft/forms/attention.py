"""nn.MultiheadAttention: factors of the packed in_proj under the module's own path, those of out_proj beside them."""

from __future__ import annotations

from collections.abc import Iterable

from loratools.core.lazy import Tensor
from loratools.formats.peft.forms.form import (
    BIAS,
    A,
    B,
    Factored,
    Form,
    Found,
    Layout,
    Module,
    bias_of,
    need_product,
    need_shape,
    scale_of,
)
from loratools.kinds.lowrank import LowRank

OUT = ".base_layer.out_proj"
_DOUBLED = "nn.MultiheadAttention: the update of out_proj acts at twice the config's scale, as PEFT applies it"
_IDLE = "nn.MultiheadAttention: PEFT never applies lora_B.bias of in_proj; it is carried along"
TWICE = 2.0  # PEFT (0.21) adds the product of out_proj and then lets its wrapped layer add it again, in every forward


class InProjection(Form):
    """in_proj_weight (3 d, d) of an attention module."""

    name = "the input projection of nn.MultiheadAttention"
    may = (BIAS,)

    def claims(self, m: Module) -> bool:
        """Claim modules with an adapted out_proj inside."""
        return m.path + OUT in m.known.paths

    def parameters(self, m: Module) -> tuple[str, ...]:
        """Return in_proj_weight, which has no module of its own."""
        return (f"{m.path}.in_proj_weight",)

    def read(self, m: Module) -> Iterable[Found]:
        """Return the update of in_proj_weight."""
        (name,) = self.parameters(m)
        idle = (BIAS,) if BIAS in m else ()
        remarks = (_IDLE,) if idle else ()
        yield Found(name, *_direction(m, name, m.path, 1.0), idle=idle, remarks=remarks)

    def write(self, u: Factored, layout: Layout) -> dict[str, Tensor]:
        """Return both factors as they stand."""
        return {A: u.a, B: u.b}


class OutProjection(Form):
    """out_proj of an attention module, which shares the module's line in the config."""

    name = "the output projection of nn.MultiheadAttention"
    may = (BIAS,)

    def claims(self, m: Module) -> bool:
        """Claim the wrapped out_proj."""
        return m.path.endswith(OUT)

    def parameters(self, m: Module) -> tuple[str, ...]:
        """Return the weight under the path of the base."""
        return (f"{m.path.removesuffix(OUT)}.out_proj.weight",)

    def read(self, m: Module) -> Iterable[Found]:
        """Return the updates of out_proj, at twice the scale of the config."""
        (name,) = self.parameters(m)
        pattern = m.path.removesuffix(OUT)
        update, layout = _direction(m, name, pattern, TWICE)
        yield Found(name, update, layout | {"form": "out_proj"}, remarks=(_DOUBLED,))
        yield from bias_of(m, f"{pattern}.out_proj.bias", update.scale / TWICE)

    def write(self, u: Factored, layout: Layout) -> dict[str, Tensor]:
        """Return both factors as they stand."""
        return {A: u.a, B: u.b}

    def file_scale(self, scale: float) -> float:
        """Return the config's scale, half of what PEFT applies."""
        return scale / TWICE


def _direction(m: Module, name: str, pattern: str, times: float) -> tuple[LowRank, dict[str, str]]:
    need_product(m, m[A].shape, m[B].shape)
    scale, _ = scale_of(m, m[A].shape[0], pattern)
    update = LowRank(m[B], m[A], scale * times)
    need_shape(m, name, update.shape)
    return update, {"path": m.path, "pattern": pattern, "form": "in_proj"}
