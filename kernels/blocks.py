"""Block sizes by shape, from a table in the repository; ``tests/bench/gpu_tune.py`` measures and rewrites it.

No tuning happens at run time: the same shapes give the same blocks, so the same bits, on every GPU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("blocks.json")

Blocks = Mapping[str, int]


@cache
def table() -> dict[str, list[dict[str, Any]]]:
    """Return kernel -> rows; a row has ``upto`` (largest shapes it is for) and ``blocks``."""
    loaded: dict[str, list[dict[str, Any]]] = json.loads(FILE.read_text())["kernels"]
    return loaded


def pick(kernel: str, **shape: int) -> Blocks:
    """Return the blocks of the first row of the kernel whose limits hold the shape; a limit not named is none."""
    rows = table()[kernel]
    return next(row["blocks"] for row in rows if all(shape[name] <= most for name, most in row["upto"].items()))


def options(blocks: Blocks) -> dict[str, int]:
    """Return how a launch is compiled: warps, pipeline stages, and the registers a thread may have (0: no limit)."""
    limit = {"maxnreg": blocks["registers"]} if blocks.get("registers") else {}
    return {"num_warps": blocks["warps"], "num_stages": blocks["stages"], **limit}
