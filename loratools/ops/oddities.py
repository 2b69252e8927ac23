"""What is odd about an adapter: things that load, and then surprise."""

from __future__ import annotations

from collections.abc import Iterator

from loratools.core.adapter import Adapter
from loratools.core.pool import parallel_map
from loratools.core.update import Array, Leaf, tensors
from loratools.kinds.lowrank import low_rank
from loratools.linalg.namespace import all_finite, dtype_name, is_float, namespace, raw_bytes, up

Tensor = tuple[str, Leaf | Array]


def oddities(adapter: Adapter) -> tuple[str, ...]:
    """Return remarks on an adapter, one sentence each; reads every tensor once.

    The reader's own remarks come first: config and tensors that disagree, idle patterns, unknown keys, altered bases.
    """
    named = [(f"{name}.{field}", t) for name, u in adapter.items() for field, t in tensors(u)]
    digests = parallel_map(_digest, [t for _, t in named], weights=[int(t.nbytes) for _, t in named])
    broken = [name for (name, t) in named if is_float(dtype_name(t)) and not all_finite(_read(t))]
    zeros = [name for (name, _), digest in zip(named, digests, strict=True) if digest == 0]
    return (
        *adapter.meta.remarks,
        *([f"not finite: {_some(broken)}"] if broken else []),
        *_untrained(adapter, set(zeros)),
        *_repeated(named, digests),
        *_local_base(adapter.meta.base_id),
        *_mixed(adapter),
    )


def _digest(t: Leaf | Array) -> int:
    """Return a checksum of the stored bytes that is 0 for tensors of zeros only."""
    import zlib

    values = _read(t)
    x = up(values)
    if not bool(namespace(x).any(x != 0)):
        return 0
    return zlib.crc32(raw_bytes(values)) or 1


def _read(t: Leaf | Array) -> Array:
    return t.read() if isinstance(t, Leaf) else t


def _untrained(adapter: Adapter, zeros: set[str]) -> Iterator[str]:
    factors = [n for n, u in adapter.items() if u.kind != "replace" and zeros & {f"{n}.{f}" for f, _ in tensors(u)}]
    if factors:
        what = "all factors" if len(factors) == len(adapter) else _some(factors)
        yield f"{what}: a factor is all zeros, so the update is zero (untrained?)"


def _repeated(named: list[Tensor], digests: list[int]) -> Iterator[str]:
    """Tensors whose bytes repeat another's; checksums find candidates, the bytes decide."""
    seen: dict[tuple[object, ...], Tensor] = {}
    repeats: list[str] = []
    for (name, t), digest in zip(named, digests, strict=True):
        if digest == 0 or t.nbytes < 64:
            continue
        first = seen.setdefault((digest, tuple(t.shape), dtype_name(t)), (name, t))
        if first[0] != name and not _one_module(first[0], name) and _same(first[1], t):
            repeats.append(f"{name} = {first[0]}")
    if repeats:
        yield f"duplicated tensors: {_some(repeats)}"


def _one_module(first: str, second: str) -> bool:
    """True for tensors of the weight and of the bias of one module: IA3 and RoAd act on both by the same numbers."""
    (module, weight, _), (other, bias, _) = first.partition(".weight."), second.partition(".bias.")
    if not weight:
        (module, weight, _), (other, bias, _) = first.partition(".bias."), second.partition(".weight.")
    return bool(weight and bias) and module == other


def _same(x: Leaf | Array, y: Leaf | Array) -> bool:
    return bool(raw_bytes(x) == raw_bytes(y))


def _local_base(base_id: str | None) -> Iterator[str]:
    if not base_id:
        yield "the file does not name its base model"
    elif base_id.startswith(("/", "\\", ".", "~")) or "\\" in base_id or base_id.count("/") > 1 or base_id[1:2] == ":":
        yield f"the base id is a local path, which means nothing elsewhere: {base_id}"


def _mixed(adapter: Adapter) -> Iterator[str]:
    found = (low_rank(u) for u in adapter.values() if u.kind in ("lowrank", "dora"))
    scales = {f"{u.scale:g}" for u in found if u is not None}
    if len(scales) > 1:
        some = ", ".join(sorted(scales)[:4])
        yield f"modules act at different scales ({some}): readers that ignore patterns are wrong"
    dtypes = {dtype_name(t) for u in adapter.values() for _, t in tensors(u)}
    if len(dtypes) > 1:
        yield f"tensors of several dtypes: {', '.join(sorted(dtypes))}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
