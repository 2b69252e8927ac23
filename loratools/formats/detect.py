"""Which format is this? Exactly one claim, or an error that lists every format asked and why it declined."""

from __future__ import annotations

from loratools.errors import AmbiguousFormatError, UnknownFormatError
from loratools.formats.base import FORMATS, Format
from loratools.formats.known import recognise
from loratools.io.bundle import Bundle
from loratools.io.manifest import KEY

_NATIVE, _MANIFEST = "the metadata say native", "a manifest says what it is"


def detect(bundle: Bundle) -> Format:
    """Return the one format that claims the bundle.

    Raises :class:`UnknownFormatError` (naming a format that is recognised but not read by this version, where that is
    the case) or :class:`AmbiguousFormatError`.
    """
    own = "loratools" in bundle.metadata  # a native file carries other programs' keys along
    if "peft_type" in (bundle.config or {}) and not own and not _torchtune(bundle):
        return FORMATS["peft"]  # no other program writes this word; asking the others would cost their imports
    if own and FORMATS["native"].declines(bundle) is None:
        return FORMATS["native"]
    spoken = ("native",) if own else ("manifest", "papers") if KEY in bundle.metadata else tuple(FORMATS)
    told = _NATIVE if own else _MANIFEST
    reasons = {name: format.declines(bundle) if name in spoken else told for name, format in FORMATS.items()}
    claims = [name for name, reason in reasons.items() if reason is None]
    if len(claims) == 1:
        return FORMATS[claims[0]]
    if claims:
        raise AmbiguousFormatError(
            "more than one format claims this file", got=", ".join(claims), hint=f"pass --format {claims[0]}"
        ).at(file=bundle.path)
    known = recognise(bundle)
    raise UnknownFormatError(
        f"this is {known}, which this version does not read" if known else "no format claims this file",
        expected="; ".join(f"{name}: {reason}" for name, reason in reasons.items()),
        got=_sample(bundle),
        hint="convert it to PEFT with its own program first" if known else "pass --format if you know what it is",
    ).at(file=bundle.path)


def _torchtune(bundle: Bundle) -> bool:
    """torchtune writes PEFT's sidecar beside its own keys."""
    return any(key.endswith(".lora_a.weight") for key in bundle.tensors)


def _sample(bundle: Bundle) -> str:
    keys = list(bundle.tensors)
    return f"{len(keys)} tensors: " + ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
