"""The forms of module in a LORA file, narrowest first: the first that claims a module reads it."""

from __future__ import annotations

from loratools.formats.peft.forms.attention import InProjection, OutProjection
from loratools.formats.peft.forms.conv import Conv
from loratools.formats.peft.forms.embedding import Embedding
from loratools.formats.peft.forms.experts import Experts
from loratools.formats.peft.forms.form import Form, Module
from loratools.formats.peft.forms.linear import Linear
from loratools.formats.peft.forms.tokens import Tokens

FORMS: dict[str, Form] = {
    "tokens": Tokens(),
    "embedding": Embedding(),
    "experts": Experts(),
    "out_proj": OutProjection(),
    "in_proj": InProjection(),
    "conv": Conv(),
    "linear": Linear(),
}
"""Form by the name that a layout uses."""


def form_of(m: Module) -> Form:
    """Return the form of a module."""
    return next(form for form in FORMS.values() if form.claims(m))
