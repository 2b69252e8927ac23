"""Embeddings: lora_embedding_A (r, vocabulary), lora_embedding_B (dim, r); the weight is (vocabulary, dim)."""

from __future__ import annotations

from collections.abc import Iterable

from loratools.core.lazy import Tensor
from loratools.formats.peft.forms.form import (
    MAGNITUDE,
    Factored,
    Form,
    Found,
    Layout,
    Module,
    coated,
    need_product,
    need_shape,
    scale_of,
)
from loratools.kinds.lowrank import LowRank

EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"


class Embedding(Form):
    """D = s (B A)^T; DoRA's magnitudes lie on the dimensions of the vectors."""

    name = "an embedding"
    needs = (EMBEDDING_A, EMBEDDING_B)
    may = (MAGNITUDE,)

    def claims(self, m: Module) -> bool:
        """Claim modules with one of the two factors."""
        return EMBEDDING_A in m or EMBEDDING_B in m

    def read(self, m: Module) -> Iterable[Found]:
        """Return the weight's update."""
        a, b = m[EMBEDDING_A], m[EMBEDDING_B]
        need_product(m, a.shape, b.shape)
        scale, remarks = scale_of(m, a.shape[0])
        direction = LowRank(a.T, b.T, scale)
        need_shape(m, m.weight, direction.shape)
        layout = {"path": m.path, "form": "embedding", "stored": "in_out"}
        yield Found(m.weight, coated(m, direction, axis=1), layout, remarks=remarks)

    def write(self, u: Factored, layout: Layout) -> dict[str, Tensor]:
        """Return both factors, transposed back."""
        return {EMBEDDING_A: u.b.T, EMBEDDING_B: u.a.T}

    def magnitude_axis(self, layout: Layout) -> int:
        """Return the axis of the vectors' dimensions."""
        return 1
