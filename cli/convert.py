"""``loratools convert``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loratools.cli import _options, _show

if TYPE_CHECKING:
    from loratools.core.adapter import Adapter

COLUMNS: tuple[_show.Column, ...] = (
    ("name", "parameter", str),
    ("route", "route", str),
    ("rank_before", "rank", str),
    ("rank_after", "->", str),
    ("relative_error", "rel. error", _show.small),
    ("bytes_before", "bytes", _show.size),
    ("bytes_after", "->", _show.size),
)
_COMMON = ("self", "adapter", "base", "options")
_PLAIN = "An adapter of a changed base (PiSSA, ...) becomes plain LoRA by IN as saved before training."
_TYPES = {"str": str, "int": int, "float": float}


class _Command(click.Command):
    """Lists formats and types with their own options below the help; they are imported only then."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from loratools.formats.base import FORMATS
        from loratools.ops.types import base as types

        with formatter.section("Formats, and what --set knows for each"):
            formatter.write_dl([(name, _listed(settings_of(name))) for name in FORMATS])
        with formatter.section("Types, and what --set knows for each"):
            formatter.write_dl([(n, f"{types.summary_of(n)} [{_listed(types.settings_of(n))}]") for n in types.TYPES])


@click.command("convert", cls=_Command, short_help="Rewrite in another format, function unchanged.")
@_options.IN
@click.option("--to", "to", metavar="FORMAT", required=True, help="Format to write.")
@click.option("--type", "type_", metavar="TYPE", help="Make it an adapter of another type first (listed below).")
@click.option("--rank", type=click.IntRange(1), help="With --type: rank of what has no exact form of this type.")
@click.option("--initial", metavar="DIR", type=click.Path(path_type=Path), help=_PLAIN)
@click.option("--altered-base", is_flag=True, help="The receiver's base is the one that IN's initialisation changed.")
@click.option("--lossy", is_flag=True, help="Allow loss where no exact way leads; it is measured and shown.")
@click.option("--explain", is_flag=True, help="Show the route of every update and write nothing.")
@click.option("--scale", type=float, help="Factor on b @ a, for files that do not say theirs (loralib, old MLX, ...).")
@click.option("--assume-split-alpha", is_flag=True, help="Block-diagonal q, k, v of Flux act as split_qkv trains them.")
@click.option("--rename", multiple=True, metavar="REGEX=REPL", help="Rename parameters; may be given several times.")
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="An option of the format or type (listed below)."
)
@_options.reading
@_options.writing
@_options.running
@_options.reporting
def command(
    *,
    path: Path,
    to: str,
    type_: str | None,
    rank: int | None,
    initial: Path | None,
    altered_base: bool,
    lossy: bool,
    explain: bool,
    scale: float | None,
    assume_split_alpha: bool,
    rename: tuple[str, ...],
    settings: tuple[str, ...],
    reading: _options.Reading,
    writing: _options.Writing,
    running: _options.Running,
    reporting: _options.Reporting,
) -> int:
    """Write IN in another format, so that the receiving program applies exactly the same update.

    Names that a format flattens are read from --base, or known for Stable Diffusion, Flux and the common language
    models. What a format cannot hold is refused by name; --lossy allows approximations and omissions, and shows them.

    --type changes the kind of adapter as well: DoRA to LoRA and back, on --base. What that costs is measured and shown.
    """
    from loratools import gates
    from loratools.cli import _session
    from loratools.cli._names import placed
    from loratools.files import load
    from loratools.ops.convert import convert

    gate = gates.parse(writing.fail_on)
    options, own = _parted(settings, to, type_)
    adapter, opened = _session.read(path, reading, running.device)
    writing = writing._replace(dry_run=writing.dry_run or explain)
    target = _session.Target(writing.output or placed(path.absolute(), to, to), writing, reporting)
    target.check([_as(adapter, to)])
    order = _options.expert_order()
    unknown = reading.allow_unknown
    first = None if initial is None else load(initial, base=opened, allow_unknown=unknown, expert_order=order)
    with _session.working(running, reporting, total_bytes=adapter.nbytes):
        done = convert(
            adapter, to, base=opened, lossy=lossy, scale=scale, rename=rename, split_alpha=assume_split_alpha,
            type=type_, rank=rank, initial=first, altered_base=altered_base, seed=running.seed, **own,
        )  # fmt: skip
    if not explain:
        _check(done, to, opened, options)
    return _session.deliver(
        done,
        [adapter, *([] if first is None else [first])],
        target,
        gate,
        columns=COLUMNS,
        worst="relative_error",
        base=opened,
        format=to,
        dtype=writing.dtype,
        **options,
    )


def _as(adapter: Adapter, to: str) -> Adapter:
    """Return the adapter as one of the format that is written: what is checked about an output depends on it."""
    from dataclasses import replace

    return replace(adapter, meta=replace(adapter.meta, format=to))


def _check(adapter: Adapter, to: str, base: Any, options: Mapping[str, Any]) -> None:
    """Let the writer speak before anything is shown."""
    from loratools.formats.base import FORMATS

    FORMATS[to].encode(adapter, base=base, **options)


def settings_of(name: str) -> dict[str, inspect.Parameter]:
    """Return the typed options of a format's writer, from its signature."""
    from loratools.formats.base import FORMATS

    parameters = inspect.signature(FORMATS[name].encode).parameters
    return {key: p for key, p in parameters.items() if key not in _COMMON}


def _listed(settings: Mapping[str, inspect.Parameter]) -> str:
    shown = (
        f"{key}={p.default!r}".lower() if p.annotation == "bool" else f"{key}={p.default}"
        for key, p in settings.items()
    )
    return ", ".join(shown) or "-"


def parsed_settings(name: str, settings: tuple[str, ...]) -> dict[str, Any]:
    """Return the options as the writer's signature types them; UsageError for others."""
    return _parsed(name, settings_of(name), settings)


def _parted(settings: tuple[str, ...], to: str, type_: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of the format and those of the type."""
    from loratools.ops.types import base as types

    of_type = types.settings_of(type_) if type_ is not None else {}
    known = settings_of(to)
    done = _parsed(to if type_ is None else f"{to} or {type_}", {**of_type, **known}, settings)
    return {k: v for k, v in done.items() if k in known}, {k: v for k, v in done.items() if k not in known}


def _parsed(name: str, known: Mapping[str, inspect.Parameter], settings: tuple[str, ...]) -> dict[str, Any]:
    from loratools.errors import UsageError

    done: dict[str, Any] = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals or key not in known:
            raise UsageError(f"--set {text}: no option of {name}", expected=", ".join(known) or "none")
        done[key] = _typed(key, value, str(known[key].annotation))
    return done


def _typed(key: str, value: str, annotation: str) -> Any:
    from loratools.errors import UsageError

    if annotation == "bool":
        if value.lower() not in ("true", "false"):
            raise UsageError(f"--set {key}={value}", expected="true or false")
        return value.lower() == "true"
    try:
        return _TYPES[annotation](value)
    except ValueError:
        raise UsageError(f"--set {key}={value}", expected=f"a value of type {annotation}") from None
