"""A model directory and a file of inputs, made ready for :func:`loratools.calibrate.collect.collect_stats`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loratools.errors import FormatError, MissingExtraError, UsageError
from loratools.io.read import existing, read_json
from loratools.io.weights import read_file
from loratools.linalg.namespace import to_numpy

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
Batches = Iterator[dict[str, Any]]


def load_model(path: Path, *, device: str = "cpu") -> Any:
    """Return the model of a directory, in evaluation mode, by transformers and from the disk alone.

    The class is the one that config.json names. On a CPU it runs in fp32, elsewhere as stored. Raises UsageError for
    anything but a model directory, MissingExtraError without transformers, FormatError where it cannot be loaded.
    """
    if not path.is_dir() or not (path / "config.json").is_file():
        raise UsageError("statistics need the directory of a model", expected="config.json and weights", got=path)
    transformers, torch = _libraries()
    named = read_json(path / "config.json").get("architectures") or ["AutoModel"]
    build = getattr(transformers, str(named[0]), None)
    if build is None:
        raise FormatError("transformers does not know this architecture", file=path, got=named[0])
    try:
        model = build.from_pretrained(path, local_files_only=True, dtype=torch.float32 if device == "cpu" else "auto")
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise FormatError("transformers cannot load this model", file=path, got=str(error).splitlines()[0]) from error
    return model.to(device).eval()


def _libraries() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            f"running a model needs {error.name}", hint="pip install 'loratools[calibrate]'"
        ) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers, torch


def tensor_batches(path: Path, *, batch: int, device: str = "cpu") -> Batches:
    """Yield batches of a safetensors file whose tensors are the model's keyword arguments, samples along axis 0."""
    _, torch = _libraries()
    tensors = read_file(existing(path)).tensors
    counts = {leaf.shape[0] for leaf in tensors.values() if leaf.shape}
    if len(counts) != 1 or any(not leaf.shape for leaf in tensors.values()):
        raise FormatError(
            "the inputs differ in their number of samples", file=path, expected="one size of the first axis",
            got=", ".join(f"{name} {leaf.shape}" for name, leaf in list(tensors.items())[:3]) or "no tensors",
        )  # fmt: skip
    for start in range(0, counts.pop(), batch):
        held = {name: leaf.rows(start, min(start + batch, leaf.shape[0])) for name, leaf in tensors.items()}
        yield {name: torch.from_numpy(to_numpy(leaf).copy()).to(device) for name, leaf in held.items()}


def text_batches(path: Path, model: Path, *, batch: int, length: int, labels: bool, device: str = "cpu") -> Batches:
    """Yield batches of the lines of a text file, by the tokenizer beside the model; longer lines are cut.

    With ``labels`` the batches ask for the loss of the next token.
    """
    transformers, _ = _libraries()
    try:
        lines = [line for line in existing(path).read_text("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise FormatError("the text is not UTF-8", file=path, got=str(error)) from None
    if not any((model / name).is_file() for name in _TOKENIZERS):
        raise FormatError("there is no tokenizer beside the model", file=model, expected=" or ".join(_TOKENIZERS))
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise FormatError(
            "transformers cannot load the tokenizer", file=model, got=str(error).splitlines()[0]
        ) from error
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    for start in range(0, len(lines), batch):
        found = tokenizer(
            lines[start : start + batch], return_tensors="pt", padding=True, truncation=True, max_length=length
        )
        held = {name: value.to(device) for name, value in found.items()}
        if labels:
            held["labels"] = held["input_ids"].masked_fill(held["attention_mask"] == 0, -100)
        yield held
