"""``loratools``: a lazy group of commands and the one boundary where errors become messages and exit codes."""

from __future__ import annotations

import errno
import gc
import importlib
import os
import sys
from pathlib import Path

import click

from loratools.errors import LoratoolsError
from loratools.version import VERSION

DONE, GATE, WRONG, BUG, INTERRUPTED = 0, 1, 2, 3, 130
_SELDOM = (
    50_000  # new objects between two searches for cycles: a command makes few, and the searches cost a tenth of it
)
_BLAS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")


class LazyGroup(click.Group):
    """Commands are the modules of this package; one is imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the module names that hold a command."""
        files = Path(__file__).parent.glob("*.py")
        return sorted(f.stem for f in files if not f.stem.startswith("_") and f.stem != "main")

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import one command."""
        if name not in self.list_commands(ctx):
            return None
        command = getattr(importlib.import_module(f"loratools.cli.{name}"), "command")  # noqa: B009
        return command if isinstance(command, click.Command) else None


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(VERSION, prog_name="loratools")
def main() -> None:
    """Squeeze, merge, fuse, convert and diagnose LoRA-family adapter files."""


def run(argv: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 gate failed, 2 wrong input, 3 our bug, 130 interrupted."""
    for name in _BLAS:  # read by BLAS when NumPy is first imported; one pool of threads, over modules
        os.environ.setdefault(name, "1")
    gc.set_threshold(_SELDOM)
    code = _code(argv)
    gc.freeze()  # what is left is freed with the process: the interpreter need not search it once more
    sys.exit(code)


def _code(argv: list[str] | None) -> int:
    try:
        return main.main(argv, prog_name="loratools", standalone_mode=False) or DONE
    except LoratoolsError as error:
        click.echo(f"loratools: {error}", err=True)
        return WRONG
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show()
        return WRONG
    except (KeyboardInterrupt, click.Abort):
        click.echo("loratools: interrupted; nothing half-written is left", err=True)
        return INTERRUPTED
    except SystemExit:  # click's word for a reader that closed the pipe
        return DONE
    except OSError as error:
        if error.errno in (errno.EPIPE, errno.ENOSPC, errno.EBADF) and not error.filename:
            return _lost_output(error)
        return _bug()
    except Exception:
        return _bug()


def _lost_output(error: OSError) -> int:
    """Standard output is closed or full: what was written to files stays; there is nobody to tell but stderr."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter would fail again on its last flush
    click.echo(f"loratools: cannot print the report: {error.strerror}", err=True)
    return WRONG


def _bug() -> int:
    import traceback

    traceback.print_exc()
    click.echo("loratools: this is a bug in loratools; please report it with the lines above", err=True)
    return BUG
