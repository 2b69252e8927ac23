"""JSON files beside the weights, read strictly."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from loratools.errors import FormatError
from loratools.io.oserrors import os_errors

LIMIT_BYTES = 10_000_000


def read_json(path: str | Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    FormatError with the file and the position for invalid JSON, a duplicate key, anything but an object at the top, or
    more than 10 MB; FileError if the file cannot be read.
    """
    path = Path(path)
    with os_errors("read the file", path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        raw = file.read(LIMIT_BYTES + 1)
    if len(raw) > LIMIT_BYTES:
        raise FormatError(
            "the JSON file is too large to be a config", file=path, expected=f"at most {LIMIT_BYTES} bytes", got=size
        )
    try:
        value = parse_json(raw)
    except FormatError as error:
        raise error.at(file=path) from None
    if not isinstance(value, dict):
        raise FormatError("the JSON file holds no object", file=path, expected="{...}", got=type(value).__name__)
    return value


def parse_json(raw: bytes) -> Any:
    """Parse UTF-8 JSON, refusing duplicate keys."""
    try:
        return json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_unique)
    except RecursionError:
        raise FormatError("the JSON is nested too deeply", hint="the file is damaged or hostile") from None
    except ValueError as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(
            "invalid JSON", got=str(error), hint="the file is damaged or not finished: fetch it again"
        ) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise FormatError(
            "a key occurs twice in the JSON", got=repr(twice), hint="readers disagree on which one counts"
        )
    return found
