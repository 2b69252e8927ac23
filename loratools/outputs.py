"""Where an adapter is written: a directory of its own, or a file with its config beside it; complete or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratools.core.adapter import Adapter
from loratools.core.update import Leaf
from loratools.errors import FileError
from loratools.io.atomic import hidden_sibling, sync
from loratools.io.bundle import Bundle
from loratools.io.oserrors import os_errors, remove
from loratools.io.write import (
    TensorPlan,
    check_output,
    copy_small_files,
    layout,
    write_directory,
    write_safetensors,
    write_text,
)
from loratools.linalg.namespace import dtype_name

CONFIG = "adapter_config.json"
CHANGES = "## Changes made by loratools"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".ckpt", ".npz")


def check_target(adapter: Adapter, path: str | Path, *, overwrite: bool) -> None:
    """Raise before any work what writing to ``path`` would raise: it exists, is an input, or is not writable.

    A file of weights next to others is refused where a config would have to lie beside it: the config speaks for all.
    """
    target = Path(path)
    check_output(target, inputs=_guarded(adapter), overwrite=overwrite)
    if target.suffix == ".safetensors" and adapter.meta.format in ("peft", "mlx"):
        _check_config(target, adapter, overwrite)


def put(adapter: Adapter, bundle: Bundle, target: Path, *, overwrite: bool) -> None:
    """Write a bundle to its target: a directory if it has a config, unless the target's name ends in .safetensors."""
    if bundle.config is None:
        check_output(target, inputs=_guarded(adapter), overwrite=overwrite)
        _write_tensors(target, bundle, overwrite=overwrite)
    elif target.suffix == ".safetensors":
        check_output(target, inputs=_guarded(adapter), overwrite=overwrite)
        _check_config(target, adapter, overwrite)
        _write_pair(target, bundle)
    else:
        _write_directory(target, adapter, bundle, overwrite)


def file_bytes(bundle: Bundle) -> int:
    """Return the bytes of the weights file that a bundle becomes, from names, shapes and dtypes alone."""
    return layout(_plan(bundle), bundle.metadata or None).nbytes


def readme_text(path: Path) -> str:
    """Return the text of a README; bytes that are not UTF-8 survive reading and writing."""
    try:
        return path.read_text("utf-8", "surrogateescape")
    except OSError as error:
        raise FileError("cannot read the README of the input", file=path, got=error.strerror) from error


def _guarded(adapter: Adapter) -> tuple[Path, ...]:
    """Inputs that an output path must not name: the weights file and the directory that holds a PEFT adapter."""
    path = adapter.meta.path
    if path is None:
        return ()
    return (path, path.parent) if (path.parent / CONFIG).exists() else (path,)


def _check_config(target: Path, adapter: Adapter, overwrite: bool) -> None:
    config = target.with_name(CONFIG)
    inputs = (adapter.meta.path.with_name(CONFIG),) if adapter.meta.path is not None else ()
    check_output(config, inputs=inputs, overwrite=overwrite)
    others = sorted(p.name for p in target.parent.iterdir() if p.suffix in _WEIGHTS and p.name != target.name)
    if others:
        raise FileError(
            "a config written here would speak for the other weights in this directory, too",
            file=target.parent,
            got=", ".join(others[:3]),
            hint="give a directory as output, or a file in a directory of its own",
        )


def _write_directory(target: Path, adapter: Adapter, bundle: Bundle, overwrite: bool) -> None:
    check_output(target, inputs=_guarded(adapter), overwrite=overwrite)

    def fill(folder: Path) -> None:
        copy_small_files(bundle.siblings, folder)
        _write_tensors(folder / bundle.weights, bundle)
        (folder / CONFIG).write_text(_json(bundle.config), "utf-8")  # the directory is forced to the disk as a whole
        (folder / "README.md").write_text(_readme(adapter), "utf-8", "surrogateescape")

    write_directory(target, fill, overwrite=overwrite)


def _write_pair(target: Path, bundle: Bundle) -> None:
    """Write weights and config under hidden names, then rename both.

    An old config goes first: a kill between the renames leaves weights that are refused for want of a config, never
    weights that act at another's scale.
    """
    config = target.with_name(CONFIG)
    weights, said = hidden_sibling(target), hidden_sibling(config)
    try:
        _write_tensors(weights, bundle)
        write_text(said, _json(bundle.config))
        with os_errors("rename the output into place", target):
            config.unlink(missing_ok=True)
            weights.replace(target)
            said.replace(config)
        sync(target.parent)
    except BaseException:
        remove(weights)
        remove(said)
        raise


def _write_tensors(path: Path, bundle: Bundle, *, overwrite: bool = False) -> None:
    if bundle.container == "gguf":
        from loratools.io.gguf import write_gguf

        write_gguf(path, bundle.tensors, bundle.metadata, overwrite=overwrite)
        return
    chunks = ((key, t.read() if isinstance(t, Leaf) else t) for key, t in bundle.tensors.items())
    write_safetensors(path, _plan(bundle), chunks, metadata=bundle.metadata or None, overwrite=overwrite)


def _plan(bundle: Bundle) -> list[TensorPlan]:
    return [TensorPlan(key, dtype_name(t), tuple(t.shape)) for key, t in bundle.tensors.items()]


def _readme(adapter: Adapter) -> str:
    """Return the source's README with a list of what was done, or a short one of our own."""
    text = "# Adapter\n" if adapter.meta.readme is None else readme_text(adapter.meta.readme)
    if not adapter.meta.history:
        return text
    before = re.sub(rf"\n*{CHANGES}\n\n(?:- .*\n)*", "\n", text).rstrip("\n")
    return "\n".join([before, "", CHANGES, "", *(f"- {line}" for line in adapter.meta.history), ""])


def _json(config: Mapping[str, Any] | None) -> str:
    return json.dumps(config, indent=2, sort_keys=True) + "\n"
