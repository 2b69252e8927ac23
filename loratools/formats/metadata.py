"""What travels in ``__metadata__``: notes are kept, figures are rewritten, hashes are never stale.

Hash rules (sd-scripts, Stability ModelSpec 1.0.1): ``sshs_model_hash`` and ``modelspec.hash_sha256`` are the SHA-256 of
all tensor bytes in the order of the file, so they are computed anew; ``sshs_legacy_hash`` covers a part of the header
too and is dropped with the first change.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from loratools.core.adapter import Meta
from loratools.core.update import Array, Leaf, shape_of
from loratools.io.dtypes import CODES
from loratools.linalg.namespace import dtype_name, raw_bytes

HISTORY = "loratools.history"
NAMES = "loratools.names"
_OWN = ("format", "lora_adapter_metadata", NAMES, HISTORY, "loratools")
MODEL_HASH, LEGACY_HASH, SPEC_HASH = "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"
_HASHES = (MODEL_HASH, LEGACY_HASH, SPEC_HASH)
Forms = Iterable[tuple[int, float]]  # (rank, alpha) per module


def carried(meta: Meta, format: str) -> dict[str, str]:
    """Return the metadata that a file of ``format`` takes over: all of its own kind's, notes of others."""
    if meta.source == format:
        kept = {k: v for k, v in meta.metadata.items() if k != HISTORY}
    else:
        kept = {k: v for k, v in meta.metadata.items() if k not in (*_OWN, *_HASHES) and not k.startswith("gguf.")}
    lines = (*history_of(meta.metadata), *meta.history)  # some readers leave the old lines among the metadata
    return {**kept, **({HISTORY: "\n".join(lines)} if lines else {})}


def history_of(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Return the lines that earlier operations left."""
    return tuple(metadata.get(HISTORY, "").splitlines())


def with_figures(metadata: dict[str, str], forms: Forms) -> dict[str, str]:
    """Return the metadata with ``ss_network_dim`` and ``ss_network_alpha`` as they are; "Dynamic" where modules differ.

    Stale ``conv_dim`` and ``conv_alpha`` leave ``ss_network_args``.
    """
    dims, alphas = ({f"{v:g}" for v in column} for column in zip(*forms, strict=True))
    args = json.loads(metadata.get("ss_network_args", "null") or "null")
    if isinstance(args, dict) and {"conv_dim", "conv_alpha"} & set(args):
        left = {k: v for k, v in args.items() if k not in ("conv_dim", "conv_alpha")}
        metadata = {**metadata, "ss_network_args": json.dumps(left)}
    return {
        **metadata,
        "ss_network_dim": dims.pop() if len(dims) == 1 else "Dynamic",
        "ss_network_alpha": alphas.pop() if len(alphas) == 1 else "Dynamic",
    }


def with_hashes(metadata: dict[str, str], tensors: Mapping[str, Leaf | Array]) -> dict[str, str]:
    """Return the metadata with every hash true of ``tensors``; reads them once if there is a hash to keep.

    A hash that still holds leaves its neighbours as they are.
    """
    if not any(key in metadata for key in _HASHES):
        return metadata
    digest = _digest(tensors)
    old = metadata.get(MODEL_HASH) or metadata.get(SPEC_HASH, "").removeprefix("0x")
    if old == digest:
        return metadata
    fresh = {MODEL_HASH: digest, SPEC_HASH: f"0x{digest}"}
    return {k: fresh.get(k, v) for k, v in metadata.items() if k != LEGACY_HASH}


def _digest(tensors: Mapping[str, Leaf | Array]) -> str:
    """SHA-256 of the tensor bytes in the order in which safetensors files hold them."""
    order = {name: i for i, name in enumerate(CODES)}
    import hashlib  # loads OpenSSL: most runs do not need it

    done = hashlib.sha256()
    for key in sorted(tensors, key=lambda k: (order[dtype_name(tensors[k])], k)):
        if 0 not in shape_of(tensors[key]):
            done.update(raw_bytes(tensors[key]))
    return done.hexdigest()
