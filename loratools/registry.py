"""Name -> thing, filled by decorators; a package's modules are imported on first use.

Adding a thing is adding a file: nothing else lists it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from loratools.errors import UsageError

T = TypeVar("T")


class Registry(Mapping[str, T]):
    """Mapping of registered things; reading it first imports every module of ``package``."""

    def __init__(self, package: str, noun: str) -> None:
        self.package = package
        self.noun = noun
        self._things: dict[str, T] = {}
        self._discovered = False

    def add(self, name: str) -> Callable[[T], T]:
        """Decorator: register the decorated thing under ``name``; a second owner of a name is a bug."""

        def register(thing: T) -> T:
            if name in self._things:
                raise ValueError(f"two {self.noun}s named {name!r}")
            self._things[name] = thing
            return thing

        return register

    def discover(self) -> None:
        """Import every module of the package once, so that all decorators have run."""
        if self._discovered:
            return
        import pkgutil  # here, because most runs name what they need

        self._discovered = True
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__, f"{self.package}."):
            importlib.import_module(module.name)

    def _try_own_module(self, name: object) -> None:
        """Import the module of the same name, which is where a thing usually lives, instead of the whole package."""
        if self._discovered or name in self._things or not str(name).isidentifier():
            return
        module = f"{self.package}.{str(name).lower()}"
        if importlib.util.find_spec(module) is not None:
            importlib.import_module(module)

    def __getitem__(self, name: str) -> T:
        self._try_own_module(name)
        if name in self._things:
            return self._things[name]
        self.discover()
        try:
            return self._things[name]
        except KeyError:
            from difflib import get_close_matches

            close = get_close_matches(name, self._things, n=1)
            hint = f"did you mean {close[0]!r}?" if close else None
            raise UsageError(
                f"unknown {self.noun} {name!r}", expected=", ".join(sorted(self._things)), hint=hint
            ) from None

    def __contains__(self, name: object) -> bool:
        self._try_own_module(name)
        if name in self._things:
            return True
        self.discover()
        return name in self._things

    def __iter__(self) -> Iterator[str]:
        self.discover()
        return iter(sorted(self._things))

    def __len__(self) -> int:
        self.discover()
        return len(self._things)
