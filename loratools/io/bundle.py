"""A bag of named tensors with what came along: metadata, config, neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from loratools.errors import LoratoolsError
from loratools.io.dtypes import dtype_name, frozen
from loratools.leaf import Array, Leaf


@dataclass(frozen=True)
class Bundle:
    """What a container holds; what the keys mean is a format's business.

    ``tensors`` in the order of the file; ``config`` the JSON object beside the weights (``adapter_config.json``) if
    there is one; ``path`` the weights file (an index for shards); ``container`` one of ``safetensors``, ``pickle``,
    ``npz``, ``gguf``, ``memory``; ``siblings`` the small files of an adapter directory that belong in a copy of it;
    ``weights`` the name of the weights file where the bundle is written as a directory (it is, if it has a config);
    ``hints`` what is known beyond the tensors (``expert_order``, the text of the ``readme``,
    the ``others`` in subfolders).
    """

    tensors: Mapping[str, Leaf]
    metadata: Mapping[str, str]
    config: Mapping[str, Any] | None = None
    path: Path | None = None
    container: str = "memory"
    siblings: tuple[Path, ...] = ()
    readme: Path | None = None
    weights: str = "adapter_model.safetensors"
    hints: Mapping[str, str] = field(default_factory=dict)


def from_memory(
    tensors: Mapping[str, Array], config: Mapping[str, Any] | None = None, metadata: Mapping[str, str] | None = None
) -> Bundle:
    """Return a bundle of NumPy arrays or torch tensors; nothing is copied, and reading gives read-only views of NumPy.

    FormatError names a tensor whose dtype no file can hold.
    """
    leaves = {name: memory_leaf(name, array) for name, array in tensors.items()}
    return Bundle(leaves, dict(metadata or {}), config)


def memory_leaf(name: str, array: Array) -> Leaf:
    """Return a leaf over an array in memory; ``name`` is for the error message."""
    try:
        dtype = dtype_name(array)
    except LoratoolsError as error:
        raise error.at(parameter=name) from None
    held = array.detach() if hasattr(array, "detach") else frozen(np.asarray(array))
    return Leaf(tuple(held.shape), dtype, lambda out: held)
