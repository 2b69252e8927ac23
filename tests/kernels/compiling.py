"""Compile every kernel for an H100-class GPU (sm_90), on any machine: what the interpreter lets through, ptxas may not.

Run as a script without TRITON_INTERPRET; prints one JSON object: variant -> registers, spilled bytes, shared memory,
and which instructions there are. Block sizes are those of the table.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loratools.kernels import compose, gram, jacobi, philox, products, row_norms, row_norms_shared, thin
from loratools.kernels.blocks import options, pick

TYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
TERMS = {"bf16": 1, "fp16": 2, "fp32": 3}

Variant = tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]


def variants() -> Iterator[Variant]:
    """Yield (name, kernel, types of the run-time arguments, constants, launch options)."""
    for family in (norm_variants, truncation_variants, product_variants):
        yield from family()


def norm_variants() -> Iterator[Variant]:
    sizes = ints("m n rank w_row b_row a_row")
    for f, rank in (("bf16", 64), ("bf16", 384), ("fp16", 64), ("fp32", 48), ("fp32", 384)):
        s, factor = pick("row_norms", itemsize=SIZES[f], rank=rank), "bf16" if f == "fp32" else f
        types = {"w": f"*{f}", "b": f"*{factor}", "a": f"*{factor}", "partial": "*fp64", "scale": "fp32", **sizes}
        more = {"EVEN": f != "fp16" and rank % s["BK"] == 0, "ONCE": rank <= s["BK"]}
        yield f"row_norms {f} {rank}", row_norms._squares, types, *sized(s, **more)
    yield "finish", row_norms._finish, {"partial": "*fp64", "out": "*fp32", "m": "i32"}, {"SPLITS": 8, "BM": 256}, {}
    for f in TYPES:
        factor = "bf16" if f == "fp32" else f
        types = {
            "w": f"*{f}",
            "b": f"*{factor}",
            "a": f"*{factor}",
            "gain": "*fp32",
            "out": "*fp32",
            "scale": "fp32",
            **sizes,
        }
        yield f"compose {f}", compose._compose, types, *sized(pick("compose", itemsize=SIZES[f]), EVEN=f != "fp16")
    for f in ("bf16", "fp32"):
        s = pick("row_norms_shared", itemsize=SIZES[f], rank=128)
        types = {"w": f"*{f}", "b": f"*{f}", "a": f"*{f}", "cross": "*fp32", "size": "*fp64", **ints("m n w_row b_row")}
        yield f"row_norms_shared {f}", row_norms_shared._terms, types, *sized(s, DOT=TYPES[f])


def truncation_variants() -> Iterator[Variant]:
    for f, type in TYPES.items():
        common = {"DTYPE": type, "ALIGNED": True, "VECTOR": 16 // SIZES[f]}
        for rank in (64, 128):
            s = pick("gram", itemsize=SIZES[f], rank=rank)
            yield f"gram {f} {rank}", gram._grams, {"items": "*i64", "out": "*fp64"}, *sized(s, BR=rank, **common)
        more = {**common, "BR": 64, "BC": 16, "D_TERMS": TERMS[f]}
        s = pick("thin", itemsize=SIZES[f], rank=64)
        yield f"thin {f} 64", thin._thin, {"items": "*i64", "cores": "*fp32"}, *sized(s, **more)
    types = {"partial": "*fp64", "first": "*i64", "out": "*fp64"}
    yield "add up", gram._add_up, types, {"SIZE": 4096, "BLOCK": 256}, {}
    for order in (26, 64, 128):
        given = {"N": order, **jacobi.tile(order), "SWEEPS": jacobi.SWEEPS, "TOLERANCE": jacobi.TOLERANCE}
        launch = {"num_warps": pick("small_svd", order=order)["warps"], "num_stages": 1}
        yield f"jacobi {order}", jacobi._sweeps, {"x": "*fp64", "v": "*fp64", "left": "*i32"}, given, launch


def product_variants() -> Iterator[Variant]:
    types = {"keys": "*i64", "out": "*bf16", **ints("n width")}
    yield "signs", philox._signs, types, {"BN": 64, "BL": 32}, {}
    types = {"x": "*fp32", "out": "*bf16", **ints("rows width")}
    yield "terms", products._terms, types, {"X_TERMS": 3, "BM": 64, "BL": 32}, {}
    for f, minus in (("bf16", False), ("bf16", True), ("fp16", False), ("fp32", False)):
        for stage in ("sketch", "times", "turned"):
            is_sketch, exact = stage == "sketch", 3 if minus else TERMS[f]
            given = {
                "DTYPE": TYPES[f], "BASE": TYPES[f], "ALIGNED": True, "VECTOR": 16 // SIZES[f], "MINUS": minus,
                "TURNED": stage == "turned", "SKETCH": is_sketch, "D_TERMS": min(exact, 2) if is_sketch else exact,
                "X_TERMS": 1 if is_sketch else 3, "BL": 32,
            }  # fmt: skip
            s = pick(stage, itemsize=SIZES[f], minus=int(minus), batch=32)
            block = "*i64" if is_sketch else "*bf16"
            types = {"sources": "*i64", "block": block, "out": "*fp32", **ints("long deep width batch_count")}
            yield f"{stage} {f}{' difference' if minus else ''}", products._product, types, *sized(s, **given)


def ints(names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), "i32")


def sized(blocks: Mapping[str, int], **more: Any) -> tuple[dict[str, Any], dict[str, int]]:
    """Return (constants, launch options) out of a row of the table and further constants."""
    constants = {name: size for name, size in blocks.items() if name.isupper() and name != "STRETCH"}
    return {**constants, **more}, options(blocks)


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], launch: dict[str, int]) -> dict[str, Any]:
    """Compile one variant; raise where Triton or ptxas refuses."""
    given = [(name, types.get(name, "constexpr")) for name in kernel.arg_names]
    hints = {(i,): [["tt.divisibility", 16]] for i, (name, type) in enumerate(given) if _is_divisible(name, type)}
    source = ASTSource(kernel, signature=dict(given), constexprs=constants, attrs=hints)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch)
    ptx = made.asm["ptx"]
    return {
        **resources(ptx),
        "shared": made.metadata.shared,
        "wgmma": "wgmma.mma" in ptx,
        "async_copies": "cp.async" in ptx,
        "tf32": "tf32" in ptx,
        "float_atomics": bool(re.search(r"\b(atom|red)\.[^;]*\.f(16|32|64)", ptx)),
    }


def _is_divisible(name: str, type: str) -> bool:
    """What Triton finds out at launch: addresses, and sizes of ordinary models, are multiples of 16."""
    return type.startswith("*") or (type == "i32" and name not in ("width", "batch_count"))


def resources(ptx: str) -> dict[str, int]:
    """Return what ptxas says of registers and spills."""
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ptxas, "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    patterns = {"registers": r"Used (\d+) registers", "spilled": r"(\d+) bytes spill stores"}
    return {key: max(map(int, re.findall(pattern, said)), default=0) for key, pattern in patterns.items()}


def of_ones(variant: Variant) -> Variant:
    """Return the variant for sizes and strides of 1, of which Triton makes constants, not tensors."""
    name, kernel, types, constants, launch = variant
    sizes = [argument for argument, type in types.items() if type == "i32"]
    rest = {argument: type for argument, type in types.items() if type != "i32"}
    return name, kernel, rest, {**constants, **dict.fromkeys(sizes, 1)}, launch


def main() -> None:
    """Compile the variants whose name holds one of the arguments (all if none), and print what came out.

    ``--ones``: for sizes and strides of 1.
    """
    wanted = [w for w in sys.argv[1:] if w != "--ones"]
    chosen = [v for v in variants() if not wanted or any(w in v[0] for w in wanted)]
    chosen = [of_ones(v) for v in chosen] if "--ones" in sys.argv else chosen
    print(json.dumps({name: compiled(*rest) for name, *rest in chosen}, indent=1))


if __name__ == "__main__":
    main()
