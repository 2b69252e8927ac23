"""Options that commands share, spelled once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

C = TypeVar("C", bound=Callable[..., Any])
DTYPES = ("float16", "bfloat16", "float32", "float64")

EXPERT_ORDER = "loratools.expert_order"

IN = click.argument("path", metavar="IN", type=click.Path(path_type=Path))
STATS = click.option(
    "--stats",
    metavar="FILE|norm",
    help="Weigh errors by what the modules see (`loratools stats`), or by --base's norms.",
)


def packing(command: C) -> C:
    """--expert-order: for whoever loads an adapter."""
    return click.option(
        "--expert-order",
        type=click.Choice(["rank-major", "expert-major"]),
        expose_value=False,
        callback=_remember,
        help="How lora_B packs experts, where the file does not tell: PEFT rank-major, Unsloth expert-major.",
    )(command)


def reading(command: C) -> C:
    """--format, --base, --allow-unknown, --expert-order: how the input is understood."""
    for option in (
        packing,
        click.option("--allow-unknown", is_flag=True, help="Carry tensors that no rule explains instead of refusing."),
        click.option("--base", metavar="PATH|auto", help="Base model (file or directory); auto: the local hub cache."),
        click.option("--format", "format", metavar="NAME", help="Read IN as this format instead of detecting it."),
    ):
        command = option(command)
    return command


def _remember(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    context.meta[EXPERT_ORDER] = value
    return value


def expert_order() -> str | None:
    """Return what --expert-order says in the running command: for whoever loads an adapter."""
    context = click.get_current_context(silent=True)
    return None if context is None else context.meta.get(EXPERT_ORDER)


def reporting(command: C) -> C:
    """--json, --quiet: how the report is shown."""
    for option in (
        click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors."),
        click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object."),
    ):
        command = option(command)
    return command


def writing(command: C) -> C:
    """-o, --overwrite, --dtype, --dry-run, --fail-on: where the result goes, and whether."""
    for option in (
        click.option(
            "--fail-on", metavar="EXPR", help="Exit 1 and write nothing where true, e.g. 'relative_error>0.1'."
        ),
        click.option("--dry-run", is_flag=True, help="Do everything but write."),
        click.option("--dtype", type=click.Choice(DTYPES), help="Store factors in this dtype (default: as the input)."),
        click.option("--overwrite", is_flag=True, help="Replace an existing output."),
        click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to write."),
    ):
        command = option(command)
    return command


def running(command: C) -> C:
    """--seed, --device, --threads: how the work is done."""
    for option in (
        click.option("--threads", type=click.IntRange(1), help="Threads to use (default: one per core)."),
        click.option(
            "--device",
            type=click.Choice(["cpu", "cuda", "auto"]),
            default="cpu",
            show_default=True,
            help="Where to compute.",
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything random."),
    ):
        command = option(command)
    return command
