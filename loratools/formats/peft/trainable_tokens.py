"""``peft_type: TRAINABLE_TOKENS``: new values of some rows of an embedding, by ``token_indices``.

The tensor is called ``trainable_tokens_delta`` and holds final values, as within LORA files.
"""

from __future__ import annotations

from loratools.core.update import Update
from loratools.errors import FormatError
from loratools.formats.peft.tuner import Module, Size, Tuner
from loratools.formats.peft.types import peft_type
from loratools.kinds.replace_rows import ReplaceRows

LEAF = "trainable_tokens_delta"


@peft_type("TRAINABLE_TOKENS")
class TrainableTokens(Tuner):
    """Rows replaced."""

    type = "TRAINABLE_TOKENS"
    leaves = (LEAF,)
    as_stored = True
    verbatim = True

    def size(self, m: Module) -> Size:
        """Return (unknown, dim)."""
        return None, m[LEAF].shape[1]

    def weight(self, m: Module) -> Update:
        """Return the rows with their numbers, in the order of the config."""
        said = m.fields.config.get("token_indices")
        if not isinstance(said, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in said):
            what = "the config does not say which rows the trained tokens replace"
            raise FormatError(what, expected="token_indices, a list of numbers", got=repr(said)[:80])
        return ReplaceRows(m[LEAF], tuple(said), m.model.stored.get(m.name, ()))
