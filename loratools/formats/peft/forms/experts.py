"""Expert stacks, PEFT's ``target_parameters``: lora_A (E r, in), lora_B (out, E r) on a bare 3-D (or 2-D) parameter.

A packs experts one after the other. B packs ranks one after the other with the expert fastest ("rank-major"), as PEFT
does, or experts one after the other ("expert-major"), as Unsloth does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from loratools.core.lazy import Tensor, permuted, reshaped
from loratools.core.update import shape_of
from loratools.errors import FormatError, NameUnresolvedError, UsageError
from loratools.formats.peft.forms.form import A, B, Factored, Form, Found, Layout, Module, need_product, scale_of
from loratools.formats.peft.forms.wrappers import bare, is_turned
from loratools.kinds.lowrank import LowRank
from loratools.kinds.stack import Stack

RANK_MAJOR, EXPERT_MAJOR = ORDERS = ("rank-major", "expert-major")
_TWO_READINGS = {
    RANK_MAJOR: "lora_B of experts is read rank-major, as PEFT packs it; Unsloth packs expert-major, and the tensors "
    "do not tell (--expert-order)",
    EXPERT_MAJOR: "lora_B of experts is read expert-major, as Unsloth packs it, which this adapter names; PEFT packs "
    "rank-major, and the tensors do not tell (--expert-order)",
}
_UNPLACED = "how the base stores these experts is not in the file: load the adapter together with its base"


class Experts(Form):
    """One wrapper of a parameter that ``target_parameters`` names."""

    name = "a parameter named by target_parameters"

    def claims(self, m: Module) -> bool:
        """Claim the wrappers."""
        return m.path in m.known.wrapped

    def parameters(self, m: Module) -> tuple[str, ...]:
        """Return every parameter that the wrapper may mean."""
        return m.known.wrapped[m.path]

    def read(self, m: Module) -> Iterable[Found]:
        """Return the update of the wrapped parameter; one expert is a plain pair."""
        a, b = m[A], m[B]
        need_product(m, a.shape, b.shape)
        meant = self.parameters(m)
        shape = m.known.shapes.get(meant[0]) if len(meant) == 1 else None
        rank, experts = _split(m, meant, shape)
        scale, remarks = scale_of(m, rank, meant[0])
        name = meant[0] if len(meant) == 1 else f"{bare(m.path)}#{_depth(m)}"
        layout = {"path": m.path, "form": "experts", "patterns": list(meant)}
        if len(shape or ()) == 2 or (shape is None and experts == 1):
            yield Found(name, LowRank(b, a, scale), layout, remarks=remarks)
            return
        size = b.shape[0], a.shape[1]
        turned = shape is not None and is_turned(size, shape, m.known.config, m.known.model_type)
        order = m.known.expert_order
        layout |= {"stored": "in_out" if turned else "out_in", "order": order}
        if not m.known.order_told and min(rank, experts) > 1:
            remarks = (*remarks, _TWO_READINGS[order])
        stack = Stack(*unpacked(b, a, experts, order, turned=turned), scale)
        yield Found(name, stack, layout, remarks=remarks, unmergeable=_UNPLACED if shape is None else None)

    def write(self, u: Factored, layout: Layout) -> dict[str, Tensor]:
        """Return both factors, packed as the layout says."""
        if isinstance(u, LowRank):
            return {A: u.a, B: u.b}
        b, a = packed(u, layout.get("order", RANK_MAJOR), turned=layout.get("stored") == "in_out")
        return {A: a, B: b}


def unpacked(b: Tensor, a: Tensor, experts: int, order: str, *, turned: bool) -> tuple[Tensor, Tensor]:
    """Return b (E, out, r), a (E, r, in) of packed factors; ``turned``: b (E, in, r), a (E, r, out), roles swapped."""
    (out, height), width = shape_of(b), shape_of(a)[1]
    r = height // experts
    wide = reshaped(a, (experts, r, width))
    rank_major = order == RANK_MAJOR
    split = reshaped(b, (out, r, experts) if rank_major else (out, experts, r))
    tall = permuted(split, (2, 0, 1) if rank_major else (1, 0, 2))
    return (permuted(wide, (0, 2, 1)), permuted(tall, (0, 2, 1))) if turned else (tall, wide)


def packed(u: Stack, order: str, *, turned: bool) -> tuple[Tensor, Tensor]:
    """Return lora_B (out, E r) and lora_A (E r, in) of a stack: the inverse of :func:`unpacked`."""
    tall, wide = (permuted(u.a, (0, 2, 1)), permuted(u.b, (0, 2, 1))) if turned else (u.b, u.a)
    experts, out, r = shape_of(tall)
    b = permuted(tall, (1, 2, 0) if order == RANK_MAJOR else (1, 0, 2))
    return reshaped(b, (out, experts * r)), reshaped(wide, (experts * r, shape_of(wide)[2]))


def order_of(told: str | None, texts: Iterable[str]) -> str:
    """Return how lora_B packs experts: as told, else expert-major if a text names Unsloth, else rank-major.

    Raises :class:`UsageError` for an unknown order.
    """
    if told is not None and told not in ORDERS:
        raise UsageError("unknown order of experts", expected=" or ".join(ORDERS), got=told)
    return told or (EXPERT_MAJOR if any("unsloth" in text.lower() for text in texts) else RANK_MAJOR)


def _split(m: Module, meant: Sequence[str], shape: tuple[int, ...] | None) -> tuple[int, int]:
    """Return (rank of one expert, experts), by the base's shape or by the config's rank."""
    height = m[A].shape[0]
    said = {(m.known.said.rank_of()(name), m.known.said.alpha_of()(name)) for name in meant}
    if len(said) > 1:
        raise NameUnresolvedError(
            "a wrapper may mean several parameters, and the config gives them different ranks or scales",
            parameter=m.path,
            got=", ".join(meant),
            hint="pass the base model: its shapes tell which one is meant",
        )
    rank, experts = int(next(iter(said))[0]), 1
    if shape is None:
        experts = height // rank
    elif len(shape) == 3:
        experts, rank = shape[0], height // shape[0]
    else:
        rank = height
    if experts * rank != height or not rank:
        expected = f"a multiple of {experts if shape else rank}"
        raise FormatError("the rows of lora_A do not divide into experts", parameter=m.path, expected=expected,
                          got=height)  # fmt: skip
    return rank, experts


def _depth(m: Module) -> int:
    """Return the wrapper's place among those of its module, 0 for the innermost."""
    return sorted((p for p in m.known.wrapped if bare(p) == bare(m.path)), key=len, reverse=True).index(m.path)
