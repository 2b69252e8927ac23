"""Options that commands share, spelled once; a group of them reaches its command as one record."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

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


class Reading(NamedTuple):
    """How the input is understood."""

    format: str | None
    base: str | None
    allow_unknown: bool


class Writing(NamedTuple):
    """Where the result goes, and whether."""

    output: Path | None
    overwrite: bool
    dtype: str | None
    dry_run: bool
    fail_on: str | None


class Running(NamedTuple):
    """How the work is done."""

    seed: int
    device: str
    threads: int | None


class Reporting(NamedTuple):
    """How the report is shown."""

    as_json: bool
    quiet: bool

    @property
    def silent(self) -> bool:
        """True where nothing but the report for programs, or nothing at all, is printed."""
        return self.as_json or self.quiet


def _together(record: Any, options: Sequence[Callable[[Any], Any]]) -> Callable[[C], C]:
    """Return a decorator that adds options, in this order, and hands their values over as one record of its name."""
    name = record.__name__.lower()

    def decorate(command: C) -> C:
        @functools.wraps(command)
        def called(*args: Any, **said: Any) -> Any:
            values = {field: said.pop(field) for field in record._fields}
            return command(*args, **said, **{name: record(**values)})

        for option in reversed(options):
            called = option(called)
        return called  # type: ignore[return-value]

    return decorate


def packing(command: C) -> C:
    """--expert-order: for whoever loads an adapter."""
    return click.option(
        "--expert-order",
        type=click.Choice(["rank-major", "expert-major"]),
        expose_value=False,
        callback=_remember,
        help="How lora_B packs experts, where the file does not tell: PEFT rank-major, Unsloth expert-major.",
    )(command)


def _remember(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    context.meta[EXPERT_ORDER] = value
    return value


def expert_order() -> str | None:
    """Return what --expert-order says in the running command: for whoever loads an adapter."""
    context = click.get_current_context(silent=True)
    return None if context is None else context.meta.get(EXPERT_ORDER)


reading = _together(
    Reading,
    (
        click.option("--format", "format", metavar="NAME", help="Read IN as this format instead of detecting it."),
        click.option("--base", metavar="PATH|auto", help="Base model (file or directory); auto: the local hub cache."),
        click.option("--allow-unknown", is_flag=True, help="Carry tensors that no rule explains instead of refusing."),
        packing,
    ),
)
"""--format, --base, --allow-unknown, --expert-order."""

writing = _together(
    Writing,
    (
        click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to write."),
        click.option("--overwrite", is_flag=True, help="Replace an existing output."),
        click.option("--dtype", type=click.Choice(DTYPES), help="Store factors in this dtype (default: as the input)."),
        click.option("--dry-run", is_flag=True, help="Do everything but write."),
        click.option(
            "--fail-on", metavar="EXPR", help="Exit 1 and write nothing where true, e.g. 'relative_error>0.1'."
        ),
    ),
)
"""-o, --overwrite, --dtype, --dry-run, --fail-on."""

running = _together(
    Running,
    (
        click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything random."),
        click.option(
            "--device",
            type=click.Choice(["cpu", "cuda", "auto"]),
            default="cpu",
            show_default=True,
            help="Where to compute.",
        ),
        click.option("--threads", type=click.IntRange(1), help="Threads to use (default: one per core)."),
    ),
)
"""--seed, --device, --threads."""

reporting = _together(
    Reporting,
    (
        click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object."),
        click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors."),
    ),
)
"""--json, --quiet."""
