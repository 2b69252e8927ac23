"""Linear layers and GPT-2's Conv1D: lora_A (r, in), lora_B (out, r); also where another parametrisation is absorbed."""

from __future__ import annotations

from collections.abc import Iterable

from loratools.core.lazy import Tensor
from loratools.formats.peft.forms.absorbed import PARAMETRISATIONS, Factors, may_be_pooled
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
    bias_of,
    coated,
    need_product,
    scale_of,
)
from loratools.kinds.lowrank import LowRank

_POOLED = "QALoRA may have pooled the inputs of this layer: load the adapter together with its (unquantised) base"


class Linear(Form):
    """W (out, in), or (in, out) where stored so; DoRA and a bias difference may come along."""

    name = "a linear layer"
    may = (BIAS, MAGNITUDE, *(leaf for p in PARAMETRISATIONS for leaf in p.leaves))

    def claims(self, m: Module) -> bool:
        """Claim what no other form does: its errors are those of ordinary factors."""
        return True

    def factors(self, m: Module) -> Factors:
        """Return b, a and the multiplier of the scale, with whatever stands between or inside them absorbed."""
        if len(m[A].shape) != 2 or len(m[B].shape) not in (2, 3):
            need_product(m, m[A].shape, m[B].shape)
        plain = Factors(m[B], m[A])
        found = [p for p in PARAMETRISATIONS if p.applies(m)]
        for p in found:
            plain = p.absorb(m, plain)
        return plain._replace(absorbed=bool(found))

    def shape(self, m: Module) -> tuple[int, int]:
        """Return (out, in)."""
        f = self.factors(m)
        need_product(m, f.a.shape, f.b.shape)
        return f.b.shape[0], f.a.shape[1]

    def read(self, m: Module) -> Iterable[Found]:
        """Return the weight's update and, if trained, the bias's."""
        f = self.factors(m)
        scale, remarks = scale_of(m, f.rank or f.a.shape[0])
        turned = m.known.turned.get(m.path, "out_in")
        b, a = (f.a.T, f.b.T) if turned == "in_out" else (f.b, f.a)
        direction = LowRank(b, a, scale * f.times)
        update = coated(m, direction, axis=1 if turned == "in_out" else 0)
        layout = {"path": m.path, "stored": turned}
        why = _POOLED if may_be_pooled(m) else None
        yield Found(m.weight, update, layout, absorbed=f.absorbed, remarks=remarks, unmergeable=why)
        yield from bias_of(m, f"{m.path}.bias", scale)

    def write(self, u: Factored, layout: Layout) -> dict[str, Tensor]:
        """Return both factors as they stand."""
        b, a = (u.a.T, u.b.T) if layout.get("stored") == "in_out" else (u.b, u.a)
        return {A: a, B: b}

    def magnitude_axis(self, layout: Layout) -> int:
        """Return the output axis."""
        return int(layout.get("stored") == "in_out")
