"""Long jobs that write many files: finished files wait in a hidden directory until the whole output is there.

The directory ``.NAME.unfinished`` beside the output holds finished files under their own names (each appears in one
step, forced to the disk) and ``job.json``, which says what job they belong to. A killed job can be continued at the
first file that is missing; only the complete output gets the output's name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loratools.errors import ExistsError, LoratoolsError, MismatchError
from loratools.io.atomic import publish, refuse_existing, replacing, sync
from loratools.io.oserrors import os_errors
from loratools.io.output import write_all
from loratools.io.sidecar import read_json

JOB = "job.json"


class Staging:
    """The hidden directory of one job; ``job`` is what must be the same for the job to be continued."""

    def __init__(self, target: Path, job: Mapping[str, Any], *, overwrite: bool) -> None:
        self.target, self.job, self.overwrite = target, json.loads(json.dumps(job)), overwrite
        self.path = target.with_name(f".{target.name[:200]}.unfinished")

    def open(self, *, resume: bool) -> None:
        """Make the directory, or find it again.

        ExistsError if an unfinished job is there and ``resume`` is false (``overwrite`` starts afresh);
        MismatchError if it is another job.
        """
        if self.path.is_dir() and (self.path / JOB).exists():
            if resume:
                self._check_same()
                return
            if not self.overwrite:
                raise ExistsError(
                    "an unfinished job for this output is there",
                    file=self.path,
                    hint="pass --resume to continue it, or --overwrite to start afresh",
                )
        refuse_existing(self.target, overwrite=self.overwrite)
        with os_errors("create the output directory", self.path):
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir()
        self.write_text(JOB, json.dumps(self.job, indent=1))

    def _check_same(self) -> None:
        found = read_json(self.path / JOB)
        differs = [key for key in {**found, **self.job} if found.get(key) != self.job.get(key)]
        if differs:
            raise MismatchError(
                "the unfinished job for this output is another one",
                file=self.path,
                got=f"different {', '.join(sorted(differs))}",
                hint="repeat the first call exactly, or pass --overwrite without --resume to start afresh",
            )

    def has(self, name: str) -> bool:
        """True if a file is finished."""
        return (self.path / name).is_file()

    @contextmanager
    def file(self, name: str) -> Iterator[int]:
        """Give a descriptor of a file that appears under its name when the block ends without error."""
        with replacing(self.path / name, overwrite=True) as fd:
            yield fd

    def write_text(self, name: str, text: str) -> None:
        """Write a small file, complete or not at all."""
        with self.file(name) as fd:
            write_all(fd, memoryview(text.encode()), 0, self.target)

    def finish(self, internal: tuple[str, ...] = (), only: str | None = None) -> None:
        """Remove the job's own files and give the directory (or the file ``only``) the output's name."""
        for name in (*internal, JOB):
            with os_errors("remove a temporary file", self.path / name):
                (self.path / name).unlink(missing_ok=True)
        for left in self.path.glob(".*.tmp"):  # of a killed run
            left.unlink()
        sync(self.path)
        publish(self.path if only is None else self.path / only, self.target, overwrite=self.overwrite)
        if only is not None:
            shutil.rmtree(self.path, ignore_errors=True)

    def discard(self) -> None:
        """Remove the directory and all that was made."""
        shutil.rmtree(self.path, ignore_errors=True)

    @contextmanager
    def kept_if(self, worth: tuple[str, ...]) -> Iterator[None]:
        """On an error inside keep the directory if one of the files ``worth`` keeping is finished, and say so."""
        try:
            yield
        except BaseException as error:
            done = sum(self.has(name) for name in worth)
            if not done:
                self.discard()
            elif isinstance(error, LoratoolsError):
                more = f"{done} of {len(worth)} files are finished: --resume continues (or delete {self.path})"
                error.hint = f"{error.hint}; {more}" if error.hint else more
            raise
