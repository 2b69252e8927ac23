"""``peft_type: VBLORA``: factors put together from a bank of vectors (arXiv:2405.15179, PEFT's ``VBLoRAConfig``).

Every stretch of A and B is a mixture of the ``topk`` vectors with the largest logits, weighed by their softmax. Files
saved with ``save_only_topk_weights`` hold indices and all weights but the last, which makes their sum 1.
"""

from __future__ import annotations

from loratools.core.lazy import computed
from loratools.core.update import Leaf
from loratools.errors import FormatError
from loratools.formats.peft.tuner import Module, Size, Tuner
from loratools.formats.peft.types import peft_type
from loratools.kinds.lowrank import LowRank
from loratools.leaf import Array
from loratools.linalg.namespace import cast, namespace, up, working_dtype

BANK = "vblora_vector_bank"
INDICES, WEIGHTS = "_topk_indices", "_topk_weights"


@peft_type("VBLORA")
class VbLora(Tuner):
    """Low-rank factors from a shared bank; rank at most r."""

    type = "VBLORA"
    leaves = tuple(f"vblora_logits_{side}{end}" for side in "AB" for end in ("", INDICES, WEIGHTS))
    shared = (BANK,)

    def size(self, m: Module) -> Size:
        """Return (out, in): the stretches of each factor times their length."""
        length = m.axes(BANK, 2)[1]
        return _stretches(m, "B")[0] * length, _stretches(m, "A")[1] * length

    def weight(self, m: Module) -> LowRank:
        """Return the mixed factors, B A."""
        rank = _stretches(m, "A")[0]
        for leaf in ("vblora_logits_A", "vblora_logits_B"):
            if leaf not in m and m.index(leaf + INDICES).shape[-1] > 1:
                m.axes(leaf + WEIGHTS, 3)
        if _stretches(m, "B")[1] != rank:
            raise FormatError("the factors do not multiply", expected=f"rank {rank}", got=_stretches(m, "B")[1])
        out, n = m.shape

        def left() -> Array:
            mixed = _mixed(m, "B")  # (out / length, r, length)
            return namespace(mixed).permute_dims(mixed, (0, 2, 1)).reshape(out, rank)

        dtype = working_dtype(m[BANK])
        right = computed((rank, n), lambda: _mixed(m, "A").reshape(rank, n), dtype)
        return LowRank(computed((out, rank), left, dtype), right)


def _stretches(m: Module, side: str) -> tuple[int, ...]:
    leaf = f"vblora_logits_{side}"
    return (m[leaf] if leaf in m else m.index(leaf + INDICES)).shape[:2]


def _mixed(m: Module, side: str) -> Array:
    """Return the stretches of a factor, (first, second, length of a vector)."""
    bank = up(m[BANK])
    xp = namespace(bank)
    leaf = f"vblora_logits_{side}"
    index, weights = _saved(m, leaf) if leaf not in m else _chosen(up(m[leaf]), m.fields.integer("topk", least=1))
    vectors = xp.take(bank, index.reshape(-1), axis=0).reshape(*index.shape, -1)
    return xp.sum(weights[..., None] * vectors, axis=-2)


def _chosen(logits: Array, count: int) -> tuple[Array, Array]:
    xp = namespace(logits)
    index = xp.argsort(-logits, axis=-1, stable=True)[..., :count]
    largest = xp.take_along_axis(logits, index, axis=-1)
    weights = xp.exp(largest - largest[..., :1])
    return index, weights / xp.sum(weights, axis=-1, keepdims=True)


def _saved(m: Module, leaf: str) -> tuple[Array, Array]:
    stored: Leaf = m.index(leaf + INDICES)
    index = cast(stored.read(), "int64")
    if stored.shape[-1] == 1:  # no weights are saved beside the one that is 1
        return index, namespace(index).ones(stored.shape, dtype=namespace(index).float32)
    weights = up(m[leaf + WEIGHTS])
    if index.shape[-1] != weights.shape[-1] + 1:
        got = f"{index.shape} and {weights.shape}"
        raise FormatError("indices and weights disagree", parameter=m.path, expected="one weight fewer", got=got)
    xp = namespace(weights)
    return index, xp.concat([weights, 1.0 - xp.sum(weights, axis=-1, keepdims=True)], axis=-1)
