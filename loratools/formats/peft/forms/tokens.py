"""Trainable tokens: new values of some rows of an embedding, whose numbers are in ``trainable_token_indices``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loratools.core.lazy import Tensor
from loratools.errors import ConversionError, FormatError
from loratools.formats.peft.forms.form import Factored, Form, Found, Layout, Module
from loratools.kinds.replace_rows import ReplaceRows

ROWS = "token_adapter.trainable_tokens_delta"
INDICES = "trainable_token_indices"


class Tokens(Form):
    """The tensor is called a delta and holds final values."""

    name = "trainable tokens"
    needs = (ROWS,)

    def claims(self, m: Module) -> bool:
        """Claim modules with rows of tokens."""
        return ROWS in m

    def read(self, m: Module) -> Iterable[Found]:
        """Return the rows with their numbers, in the order of the config."""
        index = indices(m.known.config, m.path)
        yield Found(m.weight, ReplaceRows(m[ROWS], index, m.known.shapes.get(m.weight, ())), {"path": m.path})

    def write(self, u: Factored, layout: Layout) -> dict[str, Tensor]:
        """Raise: rows are no factors."""
        raise ConversionError("rows of tokens are no factors", got=u.kind)


def indices(config: Mapping[str, Any], path: str) -> tuple[int, ...]:
    """Return the numbers of the rows of an embedding; a table's longest key that ends the path counts, as in PEFT."""
    said = config.get(INDICES)
    if isinstance(said, Mapping):
        fitting = [key for key in said if path.endswith(key)]
        said = said[max(fitting, key=len)] if fitting else None
    if not isinstance(said, list | tuple) or not all(isinstance(i, int) and not isinstance(i, bool) for i in said):
        raise FormatError(
            "the config does not say which rows the trained tokens replace",
            parameter=path,
            expected=f"{INDICES}, a list of numbers or a table of such lists",
            got=repr(said)[:80],
        )
    return tuple(said)


def said_again(config: Mapping[str, Any], rows: Mapping[str, Sequence[int]]) -> Any:
    """Return ``trainable_token_indices`` for module path -> rows: the config's own value where it still holds."""
    source = config.get(INDICES)
    if source is not None and all(indices(config, path) == tuple(index) for path, index in rows.items()):
        return source
    return {path: list(index) for path, index in rows.items()} or None
