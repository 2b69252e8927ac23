"""Threads, in one place: one BLAS thread under a pool over modules, never both.

Two BLAS threads under two pool threads made the same work three times slower; small matrices are best served by one
BLAS thread each and a pool over modules.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

X = TypeVar("X")
Y = TypeVar("Y")

POOL_BYTES = 16 << 20  # below this much work a second thread gains nothing
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of <malloc.h>
_threads: ContextVar[int | None] = ContextVar("threads", default=None)
_inside = threading.local()  # .pool is true in a worker: a map within a map runs in its worker alone
_progress: ContextVar[Callable[[int, int], None] | None] = ContextVar("progress", default=None)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Use ``count`` threads inside (None: one per core)."""
    token = _threads.set(count)
    try:
        yield
    finally:
        _threads.reset(token)


@contextmanager
def progress(callback: Callable[[int, int], None] | None) -> Iterator[None]:
    """Call ``callback(done, total)`` in units of weight after every finished task inside."""
    token = _progress.set(callback)
    try:
        yield
    finally:
        _progress.reset(token)


@contextmanager
def part(before: int, whole: int) -> Iterator[None]:
    """Let the maps inside tell their progress as a part of ``whole``, of which ``before`` was done already."""
    tell = _progress.get()
    with progress(None if tell is None else lambda done, _: tell(before + done, whole)):
        yield


def tell(done: int, whole: int) -> None:
    """Tell the progress of work that goes one by one, outside of any map."""
    callback = _progress.get()
    if callback is not None:
        callback(done, whole)


def thread_count() -> int:
    """Return the number of threads in force: what :func:`threads` set, else the cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return _threads.get() or cores or 1


def parallel_map(f: Callable[[X], Y], items: Sequence[X], *, weights: Sequence[int], threaded: bool = True) -> list[Y]:
    """Return ``[f(x) for x in items]``, run by a pool where that pays.

    ``weights`` are bytes of work per item. Results keep their order; of several errors the first in order is raised,
    whatever the timing, so results and messages do not depend on threads. A map called by a worker of another one runs
    in that worker alone, and tells no progress.
    """
    if getattr(_inside, "pool", False):
        return [f(item) for item in items]
    count = min(thread_count(), len(items)) if threaded and sum(weights) > POOL_BYTES else 1
    with single_blas_thread():
        run = _Run(f, items, weights, _progress.get())
        helpers = [threading.Thread(target=run.work, daemon=True) for _ in range(count - 1)]
        for helper in helpers:
            helper.start()
        run.work()
        for helper in helpers:
            helper.join()
    return run.results()


class _Run:
    """Shared state of one parallel map: workers take the next index until none is left or one has failed."""

    def __init__(self, f: Any, items: Sequence[Any], weights: Sequence[int], tell: Any) -> None:
        self.f, self.items, self.weights, self.tell = f, items, weights, tell
        self.out: list[Any] = [None] * len(items)
        self.errors: dict[int, BaseException] = {}
        self.next, self.done = 0, 0
        self.lock = threading.Lock()

    def take(self) -> int | None:
        with self.lock:
            if self.errors or self.next >= len(self.items):
                return None
            self.next += 1
            return self.next - 1

    def work(self) -> None:
        _inside.pool = True
        try:
            self.drain()
        finally:
            _inside.pool = False

    def drain(self) -> None:
        while (i := self.take()) is not None:
            try:
                self.out[i] = self.f(self.items[i])
            except BaseException as error:  # re-raised by results() in the caller's thread
                self.errors[i] = error
                return
            self.finished(i)

    def finished(self, i: int) -> None:
        with self.lock:
            self.done += self.weights[i]
            if self.tell is not None:
                self.tell(self.done, sum(self.weights))

    def results(self) -> list[Any]:
        if self.errors:
            raise self.errors[min(self.errors)]
        return self.out


@contextmanager
def single_blas_thread() -> Iterator[None]:
    """Limit BLAS to one thread inside; free of charge where the environment already says so."""
    if os.environ.get("OPENBLAS_NUM_THREADS") == "1" and os.environ.get("MKL_NUM_THREADS") == "1":
        yield
        return
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1, user_api="blas"):
        yield


@contextmanager
def all_blas_threads() -> Iterator[None]:
    """Let BLAS use every thread in force inside: for one large matrix at a time, outside of any pool.

    Inside a pool's worker nothing changes: never both.
    """
    if getattr(_inside, "pool", False):
        yield
        return
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=thread_count(), user_api="blas"):
        yield


def keep_freed_memory() -> None:
    """Let the C library keep up to 64 MB of freed memory for the next allocation, for the rest of the process.

    A stream of blocks allocates and frees the same megabytes again and again; glibc by default hands them back to the
    system each time, and the page faults cost as much as the arithmetic. Elsewhere nothing happens.
    """
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for parameter, value in ((_MMAP_THRESHOLD, 8 << 20), (_TRIM_THRESHOLD, 64 << 20), (_TOP_PAD, 4 << 20)):
        mallopt(parameter, value)
