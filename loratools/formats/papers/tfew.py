"""t-few's IA3 and LoRA (arXiv:2205.05638): ``multi_lora_a`` (k, in), ``multi_lora_b`` (out, k), ``lora_a``, ``lora_b``.

W' = W o (B A) / k + lora_b lora_a / r. With k = 1 and no LoRA, which is IA3, the code scales the layer's output, its
bias included; only the trained of the two vectors is saved.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratools.core.update import Leaf, Update
from loratools.errors import FormatError, NeedsBaseError
from loratools.formats.matrices import made
from loratools.formats.papers.system import Reading, System, keyed, modules, need, of_model, system
from loratools.kinds.composed import Composed
from loratools.kinds.lowrank import LowRank
from loratools.kinds.modulated import Modulated
from loratools.kinds.scaled import Scaled
from loratools.kinds.sum import Sum
from loratools.kinds.together import Together
from loratools.linalg.namespace import namespace

_KEY = r"(?P<module>.+)\.(?P<leaf>(?:multi_)?lora_[ab])"
A, B = "multi_lora_a", "multi_lora_b"


@system("t-few")
class TFew(System):
    """Weights scaled by vectors or products of low rank."""

    def claims(self, tensors: Mapping[str, Leaf]) -> bool:
        """Claim multi_lora_a or _b."""
        return any(key.endswith((f".{A}", f".{B}")) for key in tensors)

    def carries(self, key: str) -> bool:
        """Carry trained layer norms and the like, which are saved beside."""
        return of_model(key)

    def read(self, r: Reading) -> None:
        """Add the scaled weight of every module, and the scaled bias."""
        found = modules(r.tensors, _KEY)
        r.place([f"{m}.weight" for m in found], [f"{m}.bias" for m in found])
        for module, parts in found.items():
            flat = [leaf for leaf, (_, t) in parts.items() if len(t.shape) != 2]
            ranks = set() if flat else {p[1].shape[axis] for k, axis in ((A, 0), (B, 1)) if (p := parts.get(k))}
            if flat or len(ranks) > 1:
                got = ", ".join(f"{k} {t.shape}" for k, (_, t) in parts.items())
                expected = "(k, in) and (out, k)"
                raise FormatError("vectors of another shape", parameter=module, expected=expected, got=got)
            name = f"{module}.weight"
            plain = "lora_a" in parts or "lora_b" in parts
            if plain or ranks != {1}:
                r.add(name, _products(module, parts, plain=plain), keyed(parts))
                continue
            shape = _shape(r, module, parts)
            steps = [
                Scaled(parts[key][1].reshape((shape[axis],)), shape, axis)
                for key, axis in ((A, 1), (B, 0))
                if key in parts
            ]
            r.add(name, steps[0] if len(steps) == 1 else Composed(tuple(steps)), keyed(parts))
            if B in parts and (bias := r.shape(f"{module}.bias")) is not None:
                r.add(f"{module}.bias", Scaled(parts[B][1].reshape(bias), bias), {parts[B][0]: parts[B][1]})


def _shape(r: Reading, module: str, parts: Mapping[str, tuple[str, Leaf]]) -> tuple[int, ...]:
    """Return (out, in); a single vector tells one side only."""
    told = tuple(parts[key][1].shape[axis] if key in parts else None for key, axis in ((B, 0), (A, 1)))
    stored = r.shape(f"{module}.weight")
    if stored is None:
        if None in told:
            what, hint = "a single vector does not tell the shape of the weight", "pass --base (its header is enough)"
            raise NeedsBaseError(what, hint=hint).at(parameter=module)
        return tuple(n for n in told if n is not None)
    if len(stored) != 2 or any(n not in (None, m) for n, m in zip(told, stored, strict=True)):
        raise FormatError("the vectors do not fit the weight", parameter=module, expected=stored, got=told)
    return stored


def _products(module: str, parts: Mapping[str, tuple[str, Leaf]], *, plain: bool) -> Update:
    """Return W o (B A) / k + lora_b lora_a / r, of those that are there: what multiplies W is B A / k - 1 of it."""
    done: list[Update] = []
    if A in parts or B in parts:
        a, b = need(parts, module, A, B)
        tall, wide = (b.shape[0], 1), (1, a.shape[1])
        ones = LowRank(
            made(tall, [b], lambda x: namespace(x).ones(tall)), made(wide, [a], lambda x: namespace(x).ones(wide)), -1.0
        )
        done.append(Modulated(Sum((LowRank(b, a, 1 / a.shape[0]), ones))))
    if plain:
        a, b = need(parts, module, "lora_a", "lora_b")
        done.append(LowRank(b, a, 1 / a.shape[0]))
    return done[0] if len(done) == 1 else Together(tuple(done))
