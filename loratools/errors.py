"""Every error that loratools raises on purpose, from one root.

An error says what is wrong, where (file, parameter), what was expected, what was found, and what to do next. Inner code
raises tersely; :meth:`LoratoolsError.at` adds the place at the two boundaries that know it (``Adapter.map`` knows the
parameter, ``io`` knows the file).
"""

from __future__ import annotations

from typing import Self


class LoratoolsError(Exception):
    """Root of all deliberate errors; the command line turns it into one message and exit code 2."""

    def __init__(
        self,
        what: str,
        *,
        file: object = None,
        parameter: str | None = None,
        expected: object = None,
        got: object = None,
        hint: str | None = None,
    ) -> None:
        self.what = what
        self.file = None if file is None else str(file)
        self.parameter = parameter
        self.expected = expected
        self.got = got
        self.hint = hint
        super().__init__(what)

    def at(self, *, file: object = None, parameter: str | None = None) -> Self:
        """Return the same error with the place filled in where it was still unknown."""
        self.file = self.file or (None if file is None else str(file))
        self.parameter = self.parameter or parameter
        return self

    def __str__(self) -> str:
        facts = {
            "file": self.file,
            "module": self.parameter,
            "expected": self.expected,
            "got": self.got,
            "to do": self.hint,
        }
        lines = [f"  {label}: {value}" for label, value in facts.items() if value is not None]
        return "\n".join([self.what, *lines])


class UsageError(LoratoolsError, ValueError):
    """Arguments that contradict each other or lie outside their range."""


class FormatError(LoratoolsError, ValueError):
    """The bytes or keys of a file are not what its format promises."""


class UnknownFormatError(FormatError):
    """No format claims the file."""


class AmbiguousFormatError(FormatError):
    """More than one format claims the file."""


class MissingScaleError(FormatError):
    """The file does not say how strongly its factors act."""


class UnsupportedError(FormatError):
    """Recognised, and refused by name: applying it as something else would be wrong."""


class ConversionError(LoratoolsError, TypeError):
    """No exact route leads from a kind of update to what a format accepts."""


class NameUnresolvedError(LoratoolsError, KeyError):
    """A parameter name cannot be translated without more knowledge."""

    __str__ = LoratoolsError.__str__  # KeyError would print the repr


class NeedsBaseError(LoratoolsError, ValueError):
    """The request is undefined without the base weights."""


class MismatchError(LoratoolsError, ValueError):
    """Names or shapes of an adapter and a base (or of two adapters) disagree."""


class NumericsError(LoratoolsError, ArithmeticError):
    """Non-finite input, or a computation that broke down."""


class MissingExtraError(LoratoolsError, ImportError):
    """An optional dependency is not installed."""


class KernelError(LoratoolsError, RuntimeError):
    """A fused kernel failed, or none fits although one was demanded."""


class ExistsError(LoratoolsError, FileExistsError):
    """The output exists already and overwriting was not asked for."""


class FileError(LoratoolsError, OSError):
    """The operating system refused to read or write."""


class LoratoolsWarning(UserWarning):
    """Something the user should know that does not stop the work."""
