"""The files of a merged model beside its weights: index, config, README, and what is copied."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loratools.io.base import CONFIG, Base
from loratools.io.directory import README
from loratools.io.output import copy_small_files
from loratools.io.save_like import Shard, index_like, small_files
from loratools.io.staging import Staging
from loratools.ops.rewrite import internal_files


def is_single_file(base: Base, output: Path) -> bool:
    """True where a model in one file becomes one file, not a directory: the output is named like one."""
    return output.suffix == ".safetensors" and len(set(base.files.values())) <= 1


def finish(base: Base, shards: Sequence[Shard], staging: Staging, config: Mapping[str, Any], history: str) -> None:
    """Write what goes with the weights and give the output its name; ``config`` replaces fields of config.json."""
    if is_single_file(base, staging.target):
        staging.finish(internal_files(shards), only=shards[0].name)
        return
    index = index_like(base, shards)
    if index is not None:
        staging.write_text(*index)
    left = [file for file in small_files(base) if not staging.has(file.name)]
    copy_small_files([file for file in left if file.name not in (README, CONFIG)], staging.path)
    for file in left:
        if file.name == CONFIG:
            staging.write_text(CONFIG, _config(file, base, config))
        elif file.name == README:
            staging.write_text(README, f"{file.read_text('utf-8', 'replace').rstrip()}\n\n{_note(history)}")
    staging.finish(internal_files(shards))


def _config(file: Path, base: Base, config: Mapping[str, Any]) -> str:
    """Return config.json as it is, or with the fields that have to change."""
    if not config:
        return file.read_text("utf-8")
    return json.dumps({**base.config, **config}, indent=2) + "\n"


def _note(history: str) -> str:
    return f"## Changes made by loratools\n\n- {history}\n"
