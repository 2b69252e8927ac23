"""``--type dora``: a low-rank update under the magnitudes that make it the same function."""

from __future__ import annotations

from loratools.core.adapter import Adapter
from loratools.core.update import Update
from loratools.errors import ConversionError
from loratools.files import BaseLike
from loratools.formats.stored import is_turned
from loratools.kinds.dora import Dora, sum_norms
from loratools.leaf import Array, Leaf
from loratools.linalg.namespace import down
from loratools.ops.types.base import adapter_type
from loratools.ops.types.walk import as_factors, finished, walk


@adapter_type("dora")
def to_dora(adapter: Adapter, base: BaseLike | None = None) -> Adapter:
    """DoRA of the same function: magnitudes are the row norms of W + D on the base (--base).

    Exact up to fp32 rounding: the gain is 1. ``base`` must be the one of training, in the same precision. Cost
    O(m n r) per module, in blocks of rows. Updates that are DoRA already, stacks of experts and what is no weight of a
    layer are carried. Raises ConversionError for an update without exact factors, NeedsBaseError, MismatchError.
    """

    def one(name: str, u: Update, w: Leaf | Array | None) -> tuple[Update, dict[str, object]]:
        direction = as_factors(u)
        if direction is None:
            raise ConversionError(
                f"a {u.kind} update has no factors for magnitudes to stand on",
                hint="make it LoRA first: loratools convert --type lora --rank N",
            )
        assert w is not None  # walk demands the base
        axis = 1 if is_turned(adapter, name) else 0
        made = Dora(direction, down(sum_norms(w, direction, axis), "float32"), axis)
        return made, {"name": name, "rank_before": direction.rank, "rank_after": direction.rank, "relative_error": 0.0}

    done, rows = walk(adapter, base, lambda u: not isinstance(u, Dora), lambda u: True, one)
    return finished(done, adapter, rows, "dora")
