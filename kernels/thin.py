"""Products of factors with small cores, different shapes in one launch: X C for tall X, C^T X for wide X, in fp32.

Bytes are the floor: the factor is read once and a few columns are written. The core, fp32, is cut into three bf16 terms
that hold all its bits (see :func:`loratools.kernels.tiles.split_product`), so that bf16 factors stay as they are on
tensor cores; fp16 takes two terms, fp32 three. Error of an entry: (R / 16 + 6) 2^-23 |x_i| |c_j|.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from loratools.kernels.blocks import Blocks, options, pick
from loratools.kernels.spelled import TERMS
from loratools.kernels.target import FLOATS, VECTOR_BYTES, Tensor, by_rows, is_aligned, power_of_two, stretches, table
from loratools.kernels.tiles import narrow, split_product


def thin_reference(factors: Sequence[Tensor], cores: Sequence[Tensor], *, wide: Sequence[bool]) -> list[Tensor]:
    """Return the specification in float64: x @ core, or core^T @ x where wide; cores (R, k)."""
    pairs = zip(factors, cores, wide, strict=True)
    return [(c.double().mT @ x.double()) if w else (x.double() @ c.double()) for x, c, w in pairs]


@triton.jit
def _thin(
    items: tl.tensor,
    cores: tl.tensor,
    DTYPE: tl.constexpr,
    D_TERMS: tl.constexpr,
    ALIGNED: tl.constexpr,
    VECTOR: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BM: tl.constexpr,
) -> None:
    items += tl.program_id(0).to(tl.int64) * 10
    x = tl.load(items).to(tl.pointer_type(DTYPE))
    row = tl.load(items + 1)
    rank = tl.load(items + 2)
    is_wide = tl.load(items + 3)
    out = tl.load(items + 4).to(tl.pointer_type(tl.float32))
    out_row = tl.load(items + 5)
    kept = tl.load(items + 6)
    cores += tl.load(items + 7) * BR * BC
    begin = tl.load(items + 8)
    end = tl.load(items + 9)
    if ALIGNED:
        x = tl.multiple_of(x, 16)
        row = tl.multiple_of(row, VECTOR)
        rank = tl.multiple_of(rank, VECTOR)
        begin = tl.multiple_of(begin, VECTOR)
        end = tl.multiple_of(end, VECTOR)
    r, c = tl.arange(0, BR), tl.arange(0, BC)
    is_r, is_c = r < rank, c < kept
    core = tl.load(cores + r[:, None] * BC + c[None, :])
    c1 = narrow(core)
    rest = core - c1.to(tl.float32)
    c2 = narrow(rest)
    c3 = narrow(rest - c2.to(tl.float32))
    if is_wide != 0:
        for start in range(begin, end, BM):
            k = start + tl.arange(0, BM)
            tile = tl.trans(
                tl.load(x + r[:, None] * row + k[None, :], mask=is_r[:, None] & (k[None, :] < end), other=0.0)
            )
            made = split_product(tile, c1, c2, c3, D_TERMS, 3)
            tl.store(out + c[None, :] * out_row + k[:, None], made, mask=(k[:, None] < end) & is_c[None, :])
    else:
        for start in range(begin, end, BM):
            k = start + tl.arange(0, BM)
            tile = tl.load(x + k[:, None] * row + r[None, :], mask=(k[:, None] < end) & is_r[None, :], other=0.0)
            made = split_product(tile, c1, c2, c3, D_TERMS, 3)
            tl.store(out + k[:, None] * out_row + c[None, :], made, mask=(k[:, None] < end) & is_c[None, :])


def thin(
    factors: Sequence[Tensor],
    cores: Tensor,
    ranks: Sequence[int],
    *,
    wide: Sequence[bool],
    blocks: Blocks | None = None,
) -> list[Tensor]:
    """Return x @ core_i for tall x (n, R) -> (n, k_i), core_i^T @ x for wide x (R, n) -> (k_i, n), in fp32: one launch.

    ``factors`` of one dtype; ``cores (factors, R.., k..)`` fp32, of which (R, k_i) of each enter, k_i from ``ranks``.
    The results are parts of one buffer.
    """
    xs = [by_rows(x) for x in factors]
    device, size = xs[0].device, xs[0].element_size()
    side, width = power_of_two(cores.shape[1]), power_of_two(cores.shape[2])
    held = torch.zeros((len(xs), side, width), dtype=torch.float32, device=device)
    held[:, : cores.shape[1], : cores.shape[2]] = cores
    s = blocks or pick("thin", itemsize=size, rank=side)
    lengths = [x.shape[1] if w else x.shape[0] for x, w in zip(xs, wide, strict=True)]
    used = [x.shape[0] if w else x.shape[1] for x, w in zip(xs, wide, strict=True)]
    sizes = [length * k for length, k in zip(lengths, ranks, strict=True)]
    flat = torch.empty(sum(sizes), dtype=torch.float32, device=device)  # one allocation for hundreds of results
    outs = [
        part.view((k, length) if w else (length, k))
        for part, length, k, w in zip(flat.split(sizes), lengths, ranks, wide, strict=True)
    ]
    rows = [
        [x.data_ptr(), x.stride(0), rank, int(w), out.data_ptr(), out.stride(0), k, i]
        for i, (x, rank, w, out, k) in enumerate(zip(xs, used, wide, outs, ranks, strict=True))
    ]
    items, _ = stretches(rows, lengths, s["STRETCH"])
    vector = VECTOR_BYTES // size
    aligned = all(map(is_aligned, xs)) and all(x % vector == 0 for x in (*used, *lengths, s["STRETCH"]))
    _thin[(len(items),)](
        table(items, device), held, DTYPE=FLOATS[xs[0].dtype], D_TERMS=TERMS[xs[0].dtype], ALIGNED=aligned,
        VECTOR=vector, BR=side, BC=width, BM=s["BM"], **options(s),
    )  # fmt: skip
    return outs
