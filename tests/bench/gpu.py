"""GPU kernels: check, then time everything on the GPU there is, beside torch.linalg, torch.svd_lowrank and PEFT.

    python tests/bench/gpu.py --out docs/bench/gpu.json           # ten minutes at most, on a machine as bare as it is
    TRITON_INTERPRET=1 python tests/bench/gpu.py --check-only     # every line on tiny shapes, no GPU, no times

In this order: install this tree if it is not, rates of the machine, every kernel against float64, times with the table
as it is, ``tests/kernels``, the table measured anew (``gpu_tune.py``, written beside ``--out`` as blocks.json), times
with that one. The results are written after every figure: a run that is killed loses nothing, one that runs out of
time says what it left out, and a part that fails is told in its place.

Times are medians of graph replays over buffers that take turns, so that L2 is cold (``_gpu.py``); what talks to the
host is timed by the wall. Floors: bytes over the rate of a copy, flops over the rate of the library's bf16 product.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

if "--check-only" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch


def load(name: str) -> Any:
    """Import a file beside this one."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpu = load("_gpu")
if __name__ == "__main__":
    gpu.prepare()
bench, checks = load("_bench"), load("_gpu_checks")
ms = gpu.milliseconds
Figures = Iterator[tuple[str, Any]]

import loratools as lt  # noqa: E402
from loratools.core.adapter import Adapter  # noqa: E402
from loratools.kernels import blocks  # noqa: E402
from loratools.kernels.compose import composed  # noqa: E402
from loratools.kernels.gram import grams  # noqa: E402
from loratools.kernels.jacobi import svd  # noqa: E402
from loratools.kernels.products import Matrices  # noqa: E402
from loratools.kernels.row_norms import direct, direct_reference  # noqa: E402
from loratools.kernels.row_norms_shared import shared  # noqa: E402
from loratools.kernels.rsvd import decomposed, orthonormal  # noqa: E402
from loratools.kernels.thin import thin  # noqa: E402
from loratools.kinds.lowrank import LowRank  # noqa: E402
from loratools.linalg import seeds  # noqa: E402
from loratools.linalg.factored import truncate_many  # noqa: E402
from loratools.linalg.rsvd import Change, rsvd_many  # noqa: E402


def norms(machine: Any) -> Figures:
    """DoRA row norms and the compose step, beside the dense product and PEFT's own way."""
    shapes = (
        [(48, 40, 5)] if machine.tiny else [(8192, 8192, 384), (4096, 4096, 64), (8192, 28672, 384), (4096, 4096, 16)]
    )
    for dtype in (torch.bfloat16, torch.float32):
        for shape in shapes:
            name = f"{' x '.join(map(str, shape))}, {str(dtype).removeprefix('torch.')}"
            yield name, _norm(machine, machine.gemm_rate, *shape, dtype)


def _norm(machine: Any, gemm: float, m: int, n: int, rank: int, dtype: torch.dtype) -> dict[str, Any]:
    nbytes = (m * n + (m + n) * rank) * dtype.itemsize
    sets = [
        (
            machine.normal(m, n, dtype=dtype),
            machine.normal(m, rank, dtype=dtype, size=0.02),
            machine.normal(rank, n, dtype=dtype),
        )
        for _ in range(machine.copies(nbytes))
    ]
    copy, flops = machine.copy_rate(m * n * dtype.itemsize), 2 * m * n * (rank + 1)
    took = machine.seconds([lambda s=s: direct(*s, 0.5) for s in sets])
    ways = {
        "dense product, norm": lambda w, b, a: torch.linalg.vector_norm(w + 0.5 * (b @ a), dim=1),
        "peft": peft_norm,
        "eight adapters, shared form, each": lambda w, b, a: shared(w, [b] * 8, [a] * 8, [0.5] * 8),
    }
    others = {
        name: machine.seconds([lambda s=s, f=f: f(*s) for s in sets], graph="shared" not in name)  # it asks the host
        for name, f in ways.items()
    }
    others["eight adapters, shared form, each"] /= 8
    gain = torch.ones(m, device=machine.device)
    change = machine.seconds([lambda s=s: composed(*s, gain, 0.5) for s in sets])
    w, b, a = sets[0]
    want = direct_reference(w[:512], b[:512], a, 0.5).sqrt()
    error = float(((direct(w[:512], b[:512], a, 0.5).double() - want) / want).abs().max())
    floor = max(nbytes / copy, flops / gemm) if dtype == torch.bfloat16 else nbytes / copy
    return {
        "shape": [m, n, rank], "dtype": str(dtype).removeprefix("torch."), "buffers": len(sets),
        "direct_ms": ms(took), "bandwidth_gb_s": round(nbytes / took / 1e9, 1), "copy_gb_s": round(copy / 1e9, 1),
        "share_of_copy": round(nbytes / took / copy, 3), "tflop_s": round(flops / took / 1e12, 1),
        "gemm_tflop_s": round(gemm / 1e12, 1), "floor_ms": ms(floor), "share_of_floor": round(floor / took, 3),
        "compose_ms": ms(change), "compose_share_of_copy": round((nbytes + 4 * m * n) / change / copy, 3),
        "relative_error": error, "extra_bytes": machine.extra_bytes(lambda: direct(w, b, a, 0.5)),
        "others_ms": {name: ms(value) for name, value in others.items()}, "peft": PEFT,
    }  # fmt: skip


try:
    from peft.tuners.lora.dora import DoraLinearLayer

    weight_norm, PEFT = DoraLinearLayer(fan_in_fan_out=False).get_weight_norm, "its own code"
except Exception:  # not installed, or not this version of it

    def weight_norm(w: torch.Tensor, product: torch.Tensor, scaling: float) -> torch.Tensor:
        return torch.linalg.norm(w + scaling * product, dim=1).to(w.dtype)

    PEFT = "its formula, written here: PEFT is not installed"


def peft_norm(w: torch.Tensor, b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Return PEFT's norm as its forward pass makes it: the product of an identity with both factors, then the norm."""
    eye = torch.eye(a.shape[1], device=a.device, dtype=a.dtype)
    product = torch.nn.functional.linear(torch.nn.functional.linear(eye, a), b).T
    return weight_norm(w, product, 0.5)


def truncation(machine: Any) -> Figures:
    """A whole adapter of 7B shapes, r = 64 -> 8, its tensors on the device: launches, and beside torch.linalg."""
    layers, shapes = (1, {"q": (24, 20), "d": (16, 28)}) if machine.tiny else bench.SHAPES["7b"]
    rank, kept = (6, 2) if machine.tiny else (64, 8)
    made = {
        f"layers.{i}.{name}.weight": _factors(machine, m, n, rank)
        for i in range(layers)
        for name, (m, n) in shapes.items()
    }
    pairs = list(made.values())
    scales, chooses = [2.0] * len(pairs), [lambda s: kept] * len(pairs)
    run = lambda: truncate_many(pairs, scales, chooses)  # noqa: E731
    found = run()
    took = machine.wall(run)
    looped, batched = (
        machine.wall(lambda: [by_qr([pair], kept) for pair in pairs], repeats=1),
        machine.wall(lambda: by_qr(pairs, kept), repeats=2),
    )
    bs, as_ = [b for b, _ in pairs], [a for _, a in pairs]
    flags = [False] * len(pairs) + [True] * len(pairs)
    both = grams(bs + as_, wide=flags)
    cores = torch.zeros((2 * len(pairs), rank, kept), device=machine.device)
    nbytes = sum(x.numel() * x.element_size() for x in bs + as_)
    copy = machine.copy_rate(min(nbytes, 1 << 28) // 2)
    phases = {
        "gram": (machine.wall(lambda: grams(bs + as_, wide=flags)), nbytes),
        "small_svd": (machine.wall(lambda: svd(both[: len(pairs), :rank, :rank])), None),
        "small_svd_library": (machine.wall(lambda: torch.linalg.eigh(both[: len(pairs), :rank, :rank])), None),
        "thin": (machine.wall(lambda: thin(bs + as_, cores, [kept] * len(cores), wide=flags)), nbytes),
    }
    adapter = Adapter({name: LowRank(b, a, 2.0) for name, (b, a) in made.items()})
    yield "7b, 64 to 8", {
        "modules": len(pairs), "rank": [rank, kept], "bytes": nbytes, "routes": sorted({x.route for x in found}),
        "truncate_many_ms": ms(took), "squeeze_ms": ms(machine.wall(lambda: lt.squeeze(adapter, rank=kept), repeats=2)),
        "looped_qr_svd_ms": ms(looped), "batched_qr_svd_ms": ms(batched),
        "times_faster_than_looped": round(looped / took, 1),
        "floor_ms": ms(2 * nbytes / copy), "copy_gb_s": round(copy / 1e9, 1),
        "phases_ms": {name: ms(value) for name, (value, _) in phases.items()},
        "phases_share_of_copy": {name: round(size / value / copy, 3) for name, (value, size) in phases.items() if size},
    }  # fmt: skip


def _factors(machine: Any, m: int, n: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As training leaves them: a flat, the spectrum 1/j in b, hidden by a rotation (see _bench.factors)."""
    s = torch.arange(1, rank + 1, device=machine.device) ** -1.0 + 0.01
    q = torch.linalg.qr(machine.normal(rank, rank, dtype=torch.float32))[0]
    b = (machine.normal(m, rank, dtype=torch.float32) * s) @ q / m**0.5
    return b.bfloat16(), (q.mT @ machine.normal(rank, n, dtype=torch.float32) / n**0.5).bfloat16()


def by_qr(pairs: list[tuple[torch.Tensor, torch.Tensor]], kept: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What a user would write: QR of both factors and SVD of the core, in fp32, batched over equal shapes."""
    groups: dict[Any, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for b, a in pairs:
        groups.setdefault((b.shape, a.shape), []).append((b, a))
    out = []
    for group in groups.values():
        b, a = torch.stack([b for b, _ in group]).float(), torch.stack([a for _, a in group]).float()
        (qb, rb), (qa, ra) = torch.linalg.qr(2.0 * b), torch.linalg.qr(a.mT)
        u, s, vh = torch.linalg.svd(rb @ ra.mT)
        root = s[:, None, :kept].sqrt()
        out += list(zip((qb @ u[..., :kept]) * root, (qa @ vh.mT[..., :kept] * root).mT, strict=True))
    return out


def sketches(machine: Any) -> Figures:
    """Batched randomised SVD of plain matrices and of differences, beside loops and batches of torch.svd_lowrank."""
    count, size, k = (2, 40, 3) if machine.tiny else (32, 4096, 16)
    over, power = (2, 1) if machine.tiny else (10, 2)
    for minus in (False, True):
        row = _sketched(machine, count, size, k, over, power, minus=minus)
        yield "differences" if minus else "matrices", {**row, "matrices": [count, size, size, k, over, power]}


def _sketched(machine: Any, count: int, size: int, k: int, over: int, power: int, *, minus: bool) -> dict[str, Any]:
    decay = torch.arange(1, size + 1, device=machine.device) ** -1.0
    ds = [
        (
            (machine.normal(size, size, dtype=torch.float32) * decay)
            @ machine.normal(size, size, dtype=torch.float32)
            / size
        ).bfloat16()
        for _ in range(count)
    ]
    bases = [machine.normal(size, size) for _ in range(count)] if minus else None
    if bases is not None:
        ds = [(d.float() + b.float()).bfloat16() for d, b in zip(ds, bases, strict=True)]
    keys, width = [seeds.key_of(0, str(i)) for i in range(count)], k + over
    ops = ds if bases is None else [Change(d, b) for d, b in zip(ds, bases, strict=True)]
    run = lambda: rsvd_many(ops, [k] * count, keys, oversample=over, power=power)  # noqa: E731
    wide = [d.float() if bases is None else d.float() - bases[i].float() for i, d in enumerate(ds)]
    lowrank = lambda x: torch.svd_lowrank(x, q=width, niter=power)  # noqa: E731
    took, looped = machine.wall(run), machine.wall(lambda: [lowrank(x) for x in wide], repeats=1)
    batched = machine.wall(lambda: lowrank(torch.stack(wide)), repeats=1)
    errors = {"loratools": _errors(wide, [(x.u, x.s, x.vh) for x in run()], k)}
    theirs = [lowrank(x) for x in wide[:2]]
    errors["svd_lowrank"] = _errors(wide, [(u, s, v.mT) for u, s, v in theirs], k)
    batch, x = Matrices(ds, bases), machine.normal(count, size, width, dtype=torch.float32)
    nbytes = sum(d.numel() * d.element_size() for d in ds) * (2 if minus else 1)
    copy = machine.copy_rate(min(nbytes, 1 << 30) // 2)
    phases = {
        "sketch": machine.seconds([lambda: batch.sketch(keys, width)], graph=False),
        **{
            name: machine.seconds([lambda s=s: batch.sketch(keys, width, blocks=s)], graph=False)
            for name, s in _both_ways(batch).items()
        },
        "times": machine.seconds([lambda: batch.times(x)], graph=False),
        "turned": machine.seconds([lambda: batch.turned_times(x)], graph=False),
        "orthonormal": machine.seconds([lambda: orthonormal(x)], graph=False),
        "without the host": machine.seconds(
            [lambda: decomposed(batch, k, keys, width=width, power=power)], graph=False
        ),
    }
    floor = (2 * power + 2) * nbytes / copy
    return {
        "difference": minus, "rsvd_many_ms": ms(took), "looped_svd_lowrank_ms": ms(looped),
        "batched_svd_lowrank_ms": ms(batched),
        "times_faster_than_looped": round(looped / took, 1), "relative_errors_of_two": errors, "floor_ms": ms(floor),
        "share_of_floor": round(floor / took, 3), "copy_gb_s": round(copy / 1e9, 1),
        "phases_ms": {p: ms(v) for p, v in phases.items()},
        "phases_share_of_copy": {p: round(nbytes / phases[p] / copy, 3) for p in ("sketch", "times", "turned")},
    }  # fmt: skip


def _both_ways(batch: Matrices) -> dict[str, Any]:
    """Return the table's blocks of a sketch, with signs made in the tile and with signs read."""
    return {f"sketch, signs {name}": {**batch.blocks("sketch"), "fused": i} for i, name in enumerate(("read", "made"))}


def _errors(wide: list[torch.Tensor], found: list[Any], k: int) -> list[float]:
    """Relative Frobenius errors of rank k, in fp64, of the first two matrices."""
    pairs = zip(wide[:2], found[:2], strict=True)
    rest = [(d.double(), (u[:, :k].double() * s[:k].double()) @ vh[:k].double()) for d, (u, s, vh) in pairs]
    return [float(torch.linalg.matrix_norm(d - e) / torch.linalg.matrix_norm(d)) for d, e in rest]


SECTIONS: dict[str, Callable[[Any], Figures]] = {"norms": norms, "truncation": truncation, "rsvd": sketches}


class Run:
    """What was found so far, in a file after every figure, and the time that is left."""

    def __init__(self, machine: Any, clock: Any, out: Path | None) -> None:
        self.machine, self.clock, self.out, self.failed = machine, clock, out, False
        self.found: dict[str, Any] = {"gpu": machine.describe(), "measured": machine.gpu, "left_out": []}

    def write(self) -> None:
        """Write everything found so far."""
        if self.out is not None:
            with redirect_stdout(io.StringIO()):
                bench.write("gpu", self.found, self.out)

    def part(self, name: str, figures: Callable[[], Figures], *, needs_s: float = 20.0) -> None:
        """Run a part figure by figure while there is time; what fails is told and the next part begins."""
        rows: dict[str, Any] = {}
        self.found[name] = rows
        try:
            if self.clock.left < needs_s:
                self.leave_out(name)
                return
            for key, row in figures():
                rows[key] = row
                print(f"{self.clock.left:.0f} s left; {name}, {key}: {json.dumps(row)[:600]}", flush=True)
                self.write()
                if self.clock.left < needs_s:
                    self.leave_out(f"{name} after {key}")
                    return
        except (Exception, SystemExit) as error:
            self.failed = True
            rows["failed"] = f"{type(error).__name__}: {error}"[:2000]
            traceback.print_exc()
        finally:
            self.write()

    def leave_out(self, what: str) -> None:
        """Say what there was no time for."""
        self.found["left_out"].append(what)
        print(f"no time left: {what}", flush=True)


def tested(run: Run) -> Figures:
    """The kernels' own tests, compiled for this GPU, in all processes that pytest-xdist gives where it is installed."""
    many = ["-n", str(min(12, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    argv = [sys.executable, "-m", "pytest", "-q", "-x", *many, str(bench.ROOT / "tests" / "kernels")]
    env = {k: v for k, v in os.environ.items() if k != "LORATOOLS_KERNELS"}
    with tempfile.TemporaryDirectory() as elsewhere:  # the root of the tree stays off the path
        argv += ["-c", str(bench.ROOT / "pyproject.toml"), "--rootdir", str(bench.ROOT)]
        limit = max(10.0, min(180.0, run.clock.left - 60))
        done = subprocess.run(argv, capture_output=True, text=True, env=env, cwd=elsewhere, timeout=limit, check=False)
    yield "pytest tests/kernels", {"passed": done.returncode == 0, "said": done.stdout.strip()[-1500:]}


def tuned(run: Run, table: Path) -> Figures:
    """The table of block sizes, measured on this machine and used from here on."""
    limit = max(20.0, run.clock.left - 120)
    argv = [sys.executable, str(Path(__file__).with_name("gpu_tune.py")), "--out", str(table), "--limit", str(limit)]
    argv += ["--dry-run"] if run.machine.tiny else []
    done = subprocess.run(argv, capture_output=True, text=True, timeout=limit + 60, check=False)
    sys.stderr.write(done.stderr[-2000:])
    if done.returncode:
        raise RuntimeError(f"gpu_tune.py: {done.stderr[-500:]}")
    if not run.machine.tiny:
        blocks.FILE = table
        blocks.table.cache_clear()
    yield "blocks", {"said": done.stdout.splitlines(), "table": json.loads(blocks.FILE.read_text())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=[*SECTIONS, "tests", "tune"])
    parser.add_argument("--limit", type=float, default=560.0, help="seconds that the run may take")
    parser.add_argument(
        "--check-only", action="store_true", help="tiny shapes under the interpreter; times mean nothing"
    )
    args = parser.parse_args()
    if not args.check_only and not torch.cuda.is_available():
        raise SystemExit("no GPU: run with --check-only")
    os.environ["LORATOOLS_KERNELS"] = "force"
    machine = gpu.Machine(tiny=args.check_only)
    run = Run(machine, gpu.Clock(args.limit), args.out)
    run.part("rates", lambda: rates(machine))
    run.part("checks", lambda: iter([("worst error over its bound", checks.run(machine.device))]))
    for name, section in SECTIONS.items():
        if args.only in (None, name):
            run.part(name, lambda section=section: section(machine))
    if args.only in (None, "tests") and not args.check_only:
        run.part("tests", lambda: tested(run), needs_s=90)
    if args.only in (None, "tune"):
        table = (args.out or Path(tempfile.mkdtemp()) / "gpu.json").with_name("blocks.json")
        run.part("tune", lambda: tuned(run, table), needs_s=150 if machine.gpu else 0)
        for name, section in SECTIONS.items() if machine.gpu and "blocks" in run.found["tune"] else ():
            run.part(f"{name}, tuned", lambda section=section: section(machine))
    if args.check_only:
        print(json.dumps(run.found)[-2000:])
    if run.failed:
        raise SystemExit("a part failed: see above")


def rates(machine: Any) -> Figures:
    """What this machine reaches without us: a copy, and the library's bf16 product."""
    size = 1 << 10 if machine.tiny else 1 << 30
    yield "copy", {"gb_s": round(machine.copy_rate(size) / 1e9, 1), "bytes": size}
    yield "bf16 product, 8192", {"tflop_s": round(machine.gemm_rate / 1e12, 1)}


if __name__ == "__main__":
    main()
