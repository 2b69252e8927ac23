"""MoSA and its LoRA twin MoSL (arXiv:2312.02923): K copies of every factor, each trained on its own entries.

``<attention>.lora_A_q.{k}.weight`` (r, d), ``lora_B_q.{k}.weight`` (d, r), one without a number where it is shared, for
q, k, v and o; ``adapter_down.{k}.weight``, ``adapter_up.{k}.bias`` for bottlenecks. Copy k is W_0 + m_k o D_k of one
W_0: the copies' masks are disjoint, and their gradients alone were masked. The released code merges by the mean,
W_0 + (1/K) sum m_k o D_k; ``merge = "union"`` is W_0 + sum m_k o D_k, with W_0 the median over K >= 3 copies.
A stored ``*_merge`` is compared with the mean.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from loratools.core.lazy import computed
from loratools.core.update import Leaf
from loratools.errors import FormatError, UnsupportedError
from loratools.formats.papers.adaptertune import WHY
from loratools.formats.papers.system import Reading, System, of_model, system
from loratools.kinds.lowrank import LowRank
from loratools.kinds.replace import Replace
from loratools.leaf import Array
from loratools.linalg.namespace import to_numpy, up, working_dtype

_LORA = r"(?P<path>.+)\.lora_(?P<role>[AB])_(?P<mode>[qkvo])(?P<merge>_merge)?(?:\.(?P<copy>\d+))?\.weight"
_BOTTLENECK = r"(?P<stem>.+\.adapter_(?:down|up))(?P<merge>_merge)?(?:\.(?P<copy>\d+))?\.(?P<leaf>weight|bias)"
_PROJECTION = {"q": "query", "k": "key", "v": "value", "o": "out"}
DRIFT = 1e-6  # of the largest entry: what weight decay may move where no gradient came
Copies = dict[str, Leaf]  # key -> tensor, in order of their numbers


@system("mosa")
class Mosa(System):
    """Copies trained on disjoint entries."""

    settings = ("merge", "scale")

    def claims(self, tensors: Mapping[str, Leaf]) -> bool:
        """Claim numbered copies of lora_A_q or adapter_up and their kin."""
        numbered = (r".+\.lora_[AB]_[qkvo]\.\d+\.weight", r".+\.adapter_(down|up)\.\d+\.weight")
        return any(re.fullmatch(pattern, key) for key in tensors for pattern in numbered)

    def carries(self, key: str) -> bool:
        """Carry the backbone, the head and the merged tensors, which are zero until a merge."""
        return of_model(key) and (not re.search(r"\.lora_[AB]_|\.adapter_(down|up)\.", key) or "_merge." in key)

    def read(self, r: Reading) -> None:
        """Merge the copies of every factor."""
        how = r.word("merge", ("mean", "union"), "mean")
        self._lora(r, how)
        self._bottlenecks(r, how)

    def _lora(self, r: Reading, how: str) -> None:
        found, merged = _sorted(r.tensors, _LORA, ("path", "mode", "role"))
        for path, mode in dict.fromkeys((p, m) for p, m, _ in found):
            sides = [found.get((path, mode, role)) for role in "BA"]
            if None in sides:
                raise FormatError(
                    "half of a factor pair is missing", parameter=path, expected=f"lora_A_{mode}, lora_B_{mode}"
                )
            b, a = (_merged(copies or {}, how, path) for copies in sides)
            for role, one in (("B", b), ("A", a)):
                _compare(r, merged.get((path, mode, role), {}), one, how)
            used = {**(sides[0] or {}), **(sides[1] or {})}
            r.add(f"{path}.{_PROJECTION[mode]}.weight", LowRank(b, a, r.number("scale", default=1.0)), used)

    def _bottlenecks(self, r: Reading, how: str) -> None:
        found, merged = _sorted(r.tensors, _BOTTLENECK, ("stem", "leaf"))
        for (stem, leaf), copies in found.items():
            one = _merged(copies, how if leaf == "weight" else "mean", stem)  # biases are trained whole by every copy
            _compare(r, merged.get((stem, leaf), {}), one, how)
            module, _, last = stem.rpartition(".")
            role = last.removeprefix("adapter_")
            r.add(f"{stem}.{leaf}", Replace(one), copies, why=WHY, bottleneck=module, role=f"{role}.{leaf}")
        if found:
            r.remarks.append(f"{len(found)} tensors of bottlenecks: {WHY}; they are merged copies, read and diagnosed")


def _sorted(
    tensors: Mapping[str, Leaf], pattern: str, groups: Sequence[str]
) -> tuple[dict[tuple[str, ...], Copies], dict[tuple[str, ...], Copies]]:
    """Return the copies of every factor by what names it, and those that a merge stored."""
    found: dict[tuple[str, ...], Copies] = {}
    merged: dict[tuple[str, ...], Copies] = {}
    matches = [(key, leaf, m) for key, leaf in tensors.items() if (m := re.fullmatch(pattern, key))]
    for key, leaf, m in sorted(matches, key=lambda item: int(item[2]["copy"] or 0)):
        (merged if m["merge"] else found).setdefault(tuple(m[g] for g in groups), {})[key] = leaf
    return found, merged


def _merged(copies: Copies, how: str, where: str) -> Leaf:
    """Return one tensor for all copies of a factor, put together when it is read; a shared one is itself."""
    leaves = list(copies.values())
    if len(leaves) == 1:
        return leaves[0]
    if len({leaf.shape for leaf in leaves}) > 1:
        raise FormatError("copies of different shapes", parameter=where, got=", ".join(str(t.shape) for t in leaves))
    if how == "union" and len(leaves) == 2:
        what = "the union of two copies: which entry was trained cannot be told without their masks"
        raise UnsupportedError(what, parameter=where, expected="3 copies or more", hint='merge = "mean"')
    dtype = working_dtype(*leaves)

    def run() -> Array:
        stack = np.stack([to_numpy(up(leaf, "float64")) for leaf in leaves])
        return (stack.mean(axis=0) if how == "mean" else union(stack, where)).astype(dtype)

    return computed(leaves[0].shape, run, dtype)


def union(stack: Array, where: str) -> Array:
    """Return W_0 + sum_k (W_k - W_0) with W_0 the median over copies (K, ...).

    Raises :class:`FormatError` where two copies left W_0 at one entry: then their masks were not disjoint.
    """
    start = np.median(stack, axis=0)
    moved = stack - start
    moved[np.abs(moved) <= DRIFT * np.abs(stack).max()] = 0.0
    several = (moved != 0).sum(axis=0) > 1
    if several.any():
        got = f"{int(several.sum())} of {several.size} entries differ in more than one copy"
        raise FormatError("the copies were not trained on disjoint entries", parameter=where, got=got)
    return start + moved.sum(axis=0)


def _compare(r: Reading, stored: Copies, merged: Leaf, how: str) -> None:
    """Tell how far a stored merge is from the merge of the copies."""
    for key, leaf in stored.items():
        gap = float(np.abs(to_numpy(up(leaf, "float64")) - to_numpy(up(merged, "float64"))).max())
        r.remarks.append(f"{key}: differs from the {how} of the copies by {gap:.3g}")
