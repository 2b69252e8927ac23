"""loratools: squeeze, merge, fuse, convert and diagnose LoRA-family adapter files.

``import loratools as lt`` costs nothing: every verb is imported when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from loratools.version import VERSION

__version__ = VERSION

_EXPORTS = {
    "load": "loratools.files",
    "save": "loratools.files",
    "from_state_dict": "loratools.files",
    "squeeze": "loratools.ops.squeeze",
    "fuse_sparse": "loratools.ops.fuse_sparse",
    "sparse_interference": "loratools.ops.sparse_interference",
    "switch": "loratools.ops.switch",
    "Switchboard": "loratools.ops.switchboard",
    "quantize": "loratools.ops.quantise",
    "dequantize": "loratools.ops.dequantise",
    "shira": "loratools.ops.sparsify",
    "resize": "loratools.ops.resize",
    "slice": "loratools.ops.slice",
    "info": "loratools.ops.info",
    "check": "loratools.ops.check",
    "convert": "loratools.ops.convert",
    "merge": "loratools.ops.merge",
    "merged": "loratools.ops.merge",
    "unmerge": "loratools.ops.unmerge",
    "extract": "loratools.ops.extract",
    "extract_sparse": "loratools.ops.extract_sparse",
    "recover": "loratools.ops.altered",
    "to_dora": "loratools.ops.types.dora",
    "to_lora": "loratools.ops.types.lora",
    "diagnose": "loratools.ops.diagnose",
    "tame": "loratools.ops.tame",
    "fuse": "loratools.ops.fuse",
    "compare": "loratools.ops.compare",
    "collapse": "loratools.ops.collapse",
    "routing": "loratools.ops.routing",
    "split": "loratools.ops.shards",
    "join": "loratools.ops.shards",
    "collect_stats": "loratools.calibrate.collect",
    "load_stats": "loratools.io.stats",
    "save_stats": "loratools.io.stats",
    "RankAnnealer": "loratools.calibrate.anneal",
    "Adapter": "loratools.core.adapter",
    "Report": "loratools.report",
    "LoratoolsError": "loratools.errors",
}

__all__ = ["__version__"]
__all__ += list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'loratools' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
