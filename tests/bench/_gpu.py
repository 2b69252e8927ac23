"""What the GPU benchmarks share: the device, cold buffers, timing by graph replay or events, rates to compare with."""

from __future__ import annotations

import importlib
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]
ROOT = Path(__file__).parents[2]
PREPARED = "LORATOOLS_BENCH_PREPARED"


def prepare() -> None:
    """Make a bare machine ready and start over: install this tree where it is not, and find what it may lack.

    A machine may have torch and SciPy and no array-api-compat: SciPy and scikit-learn carry whole copies of it, of
    which one is lent under its own name. Nothing is downloaded.
    """
    if os.environ.get(PREPARED):
        return
    again = {**os.environ, PREPARED: "1"}
    if importlib.util.find_spec("loratools") is None:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "-e", str(ROOT)]
        subprocess.run(pip, check=True)
    if importlib.util.find_spec("array_api_compat") is None:
        folder = Path(tempfile.mkdtemp(prefix="lent-"))
        (folder / "array_api_compat").symlink_to(carried("array_api_compat"))
        again["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
        print(f"array_api_compat is not installed: lending {carried('array_api_compat')}", file=sys.stderr)
    elif importlib.util.find_spec("loratools") is not None:
        return
    os.execve(sys.executable, [sys.executable, *sys.argv], again)


def carried(package: str) -> Path:
    """Return the folder of a copy of ``package`` that an installed library carries."""
    for place in ("sklearn.externals", "scipy._external", "scipy._lib"):
        try:
            found = importlib.util.find_spec(f"{place}.{package}")
        except ModuleNotFoundError:
            continue
        if found is not None and found.origin is not None:
            return Path(found.origin).parent
    raise SystemExit(f"{package} is neither installed nor carried by SciPy or scikit-learn")


class Clock:
    """The time that a run may take."""

    def __init__(self, limit_s: float) -> None:
        self.end = time.monotonic() + limit_s

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.end - time.monotonic()


class Machine:
    """The device that is measured; ``tiny`` runs every line on small shapes and says nothing about speed."""

    def __init__(self, *, tiny: bool) -> None:
        self.tiny = tiny
        self.gpu = torch.cuda.is_available() and not tiny
        self.device = torch.device("cuda" if self.gpu else "cpu")
        self.copied: dict[int, float] = {}
        self.generator = torch.Generator(device=self.device).manual_seed(0)

    def describe(self) -> dict[str, Any]:
        """Name, driver-level facts and versions."""
        facts: dict[str, Any] = {"torch": torch.__version__, "triton": __import__("triton").__version__}
        if not self.gpu:
            return {**facts, "device": "none: Triton's interpreter, speed means nothing"}
        found = torch.cuda.get_device_properties(0)
        return {
            **facts,
            "device": found.name,
            "cuda": torch.version.cuda,
            "processors": found.multi_processor_count,
            "memory_gib": round(found.total_memory / 2**30, 1),
            "l2_mib": round(self.l2_bytes() / 2**20, 1),
        }

    def l2_bytes(self) -> int:
        """Size of the L2 cache."""
        return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 50 << 20)) if self.gpu else 1

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16, size: float = 1.0) -> torch.Tensor:
        """Normal numbers in the dtype, on the device."""
        return (size * torch.randn(*shape, generator=self.generator, device=self.device)).to(dtype)

    def copies(self, nbytes: int) -> int:
        """How many buffers of a size must take turns so that none is found in L2: together four times as large."""
        return 1 if self.tiny else max(2, -(-4 * self.l2_bytes() // max(nbytes, 1)))

    def seconds(self, calls: Sequence[Call], *, graph: bool = True, repeats: int = 20) -> float:
        """Return the median time of one call; the calls take turns. By replay of a CUDA graph, or by events alone."""
        for call in calls[:2]:
            call()
        if not self.gpu:
            start = time.perf_counter()
            calls[0]()
            return time.perf_counter() - start
        run = self._captured(calls) if graph else (lambda: [call() for call in calls])
        run()
        torch.cuda.synchronize()
        found = []
        for _ in range(repeats):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            found.append(begin.elapsed_time(end) / 1e3 / len(calls))
        return statistics.median(found)

    def wall(self, call: Call, *, repeats: int = 5) -> float:
        """Return the median wall time of a call that talks to the host, the device idle before and after."""
        found = []
        for _ in range(1 if self.tiny else repeats + 1):
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            found.append(time.perf_counter() - start)
        return statistics.median(found[1:] or found)

    def wait(self) -> None:
        """Wait for the device."""
        if self.gpu:
            torch.cuda.synchronize()

    def extra_bytes(self, call: Call) -> int | None:
        """Return the most memory that a call takes beyond what was taken before, its result included."""
        if not self.gpu:
            return None
        call()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)

    def _captured(self, calls: Sequence[Call]) -> Call:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay

    def copy_rate(self, nbytes: int) -> float:
        """Return bytes per second (read and written) of a copy of so many bytes, timed the same way, L2 cold."""
        if nbytes not in self.copied:
            self.copied[nbytes] = self._copy_rate(nbytes)
        return self.copied[nbytes]

    def _copy_rate(self, nbytes: int) -> float:
        count = self.copies(2 * nbytes)
        pairs = [[self.normal(-(-nbytes // 2)).view(torch.uint8)[:nbytes] for _ in range(2)] for _ in range(count)]
        return 2 * nbytes / self.seconds([lambda a=a, b=b: b.copy_(a) for a, b in pairs])

    @cached_property
    def gemm_rate(self) -> float:
        """Flop per second that the library's bf16 product of 8192 x 8192 matrices really reaches."""
        size = 64 if self.tiny else 8192
        x, y = self.normal(size, size), self.normal(size, size)
        return 2 * size**3 / self.seconds([lambda: x @ y])


def milliseconds(value: float) -> float:
    return round(1e3 * value, 4)
