"""A fully fine-tuned model seen as an adapter: every matrix that it shares with its base is one stored whole."""

from __future__ import annotations

from loratools.core.adapter import Adapter, Meta
from loratools.files import BaseLike, open_base
from loratools.io.quantised import refuse_quantised
from loratools.kinds.replace import Replace


def whole_model(tuned: BaseLike) -> Adapter:
    """Return the adapter that replaces every matrix of a model (a path or a mapping) by the tuned one; reads nothing.

    Vectors are left out. Raises FileError and FormatError as opening a base does, UnsupportedError if it is quantised.
    """
    model = open_base(tuned)
    assert model is not None  # only None opens as None
    refuse_quantised(model)
    updates = {name: Replace(model.leaf(name)) for name, shape in model.shapes.items() if len(shape) > 1}
    first = next(iter(model.files.values()), None)  # the file whose hash a report tells
    return Adapter(updates, Meta(format="model", path=first))
