"""What is wrong with a safetensors header, said so that a user can act.

The official parser decides; this file only finds better words, tensor names and numbers for its refusals.
"""

from __future__ import annotations

import json
import re
from math import prod
from typing import Any

from loratools.errors import FormatError
from loratools.io.dtypes import NAMES
from loratools.leaf import ITEMSIZE

LIMIT_BYTES = 100_000_000  # of a header; the official parser's own limit
_AGAIN = "the file is damaged or cut short: download or copy it again"


def too_long(length: int, file_size: int) -> FormatError | None:
    """Return the error for a header length that cannot be, before anything of that length is read."""
    if length > LIMIT_BYTES:
        return FormatError(
            "the header of the safetensors file claims to be too large",
            expected=f"at most {LIMIT_BYTES} bytes",
            got=f"{length} bytes",
            hint="the file is damaged, hostile, or no safetensors file",
        )
    if length + 8 > file_size:
        return FormatError(
            "the safetensors file ends inside its header, or the header length is wrong",
            expected=f"at least {length + 8} bytes",
            got=f"{file_size} bytes",
            hint=_AGAIN,
        )
    return None


def explained(message: str, raw: bytes, file_size: int) -> FormatError:
    """Return the FormatError for a refusal of the official parser."""
    reason = message.removeprefix("Error while deserializing header: ")
    if "not fully covered" in reason:
        return _wrong_size(raw, file_size)
    if match := re.search(r"unknown variant `(.*?)`", reason):
        return _unknown_dtype(match[1], raw)
    if match := re.search(r"invalid offset for tensor `(.*?)`", reason):
        return FormatError(
            f"the bytes of tensor {match[1]!r} overlap others, leave a gap, or end before they begin",
            got=_field(raw, match[1], "data_offsets"),
            hint="the file is damaged or was written by a faulty program: write it again",
        )
    return FormatError("the safetensors file has an invalid header", got=_plainer(reason, raw), hint=_AGAIN)


def _wrong_size(raw: bytes, file_size: int) -> FormatError:
    """More or fewer bytes than the header describes."""
    stops = [info["data_offsets"][1] for info in _infos(raw).values()]
    expected = 8 + len(raw) + max(stops, default=0)
    more = file_size > expected
    return FormatError(
        "the safetensors file is longer than its header says" if more else "the safetensors file is truncated",
        expected=f"{expected} bytes",
        got=f"{file_size} bytes",
        hint="something was appended to it: write it again" if more else _AGAIN,
    )


def _unknown_dtype(code: str, raw: bytes) -> FormatError:
    names = [name for name, info in _infos(raw).items() if info.get("dtype") == code]
    where = f"tensor {names[0]!r} has" if names else "a tensor has"
    return FormatError(
        f"{where} an unknown dtype",
        expected=", ".join(NAMES),
        got=code,
        hint="a newer version of the safetensors package may know it",
    )


def _plainer(reason: str, raw: bytes) -> str:
    """Name the tensor where the parser only says that one of them is wrong."""
    if "invalid shape" not in reason:
        return reason
    for name, info in _infos(raw).items():
        start, stop = info["data_offsets"]
        text = f"tensor {name!r}: dtype {info['dtype']}, shape {info['shape']}, but {stop - start} bytes"
        if not _fits(info, stop - start):
            return text
    return reason


def _fits(info: dict[str, Any], nbytes: int) -> bool:
    name = NAMES.get(info["dtype"])
    return name is None or prod(info["shape"]) * ITEMSIZE[name] == nbytes


def _field(raw: bytes, name: str, field: str) -> Any:
    return _infos(raw).get(name, {}).get(field)


def _infos(raw: bytes) -> dict[str, dict[str, Any]]:
    """Return the well-formed entries of a header; none if it is not a JSON object."""
    try:
        said = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return {name: info for name, info in said.items() if _well_formed(info)} if isinstance(said, dict) else {}


def _well_formed(info: Any) -> bool:
    if not isinstance(info, dict) or not isinstance(info.get("dtype"), str):
        return False
    offsets, shape = info.get("data_offsets"), info.get("shape")
    numbers = [*offsets, *shape] if isinstance(offsets, list) and isinstance(shape, list) else [None]
    return len(offsets or ()) == 2 and all(isinstance(number, int) for number in numbers)
