"""RandLoRA's own code for language and vision (arXiv:2502.00987), beside the fork of PEFT (``peft_type: RANDLORA``).

``<module>.randlora_lambda`` (n, r), ``randlora_gamma`` (n, least), ``basis_b`` (n, most, r), ``basis_a`` (n or 1, r,
least). The stored weight changes by alpha / r / sqrt(n) times the product of both flattened bases, *viewed* in the
weight's shape: where its rows are the shorter side that is no transpose. lambda lies (n, r) here, and (r, n) in PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import sqrt

from loratools.core.update import Leaf
from loratools.errors import FormatError, UnsupportedError
from loratools.formats.matrices import made
from loratools.formats.papers.system import Reading, System, keyed, modules, need, need_axes, of_model, system
from loratools.kinds.dense import Dense
from loratools.leaf import Array
from loratools.linalg.namespace import namespace

_LEAVES = ("randlora_lambda", "randlora_gamma", "basis_a", "basis_b")
_KEY = rf"(?P<module>.+)\.(?P<leaf>{'|'.join(_LEAVES)})"


@system("randlora")
class RandLora(System):
    """Full rank out of random bases, as the first code stores it."""

    settings = ("alpha",)

    def claims(self, tensors: Mapping[str, Leaf]) -> bool:
        """Claim randlora_lambda beside basis_b."""
        return any(key.endswith(".basis_b") for key in tensors) and any("randlora_lambda" in key for key in tensors)

    def carries(self, key: str) -> bool:
        """Carry the frozen model and its head, where they are saved, too."""
        return of_model(key)

    def read(self, r: Reading) -> None:
        """Add the update of every module."""
        found = {m: p for m, p in modules(r.tensors, _KEY).items() if "randlora_lambda" in p}
        r.place(f"{m}.weight" for m in found)
        for module, parts in found.items():
            rows, gamma, a, b = need(parts, module, *_LEAVES)
            shapes = f"lambda {rows.shape}, gamma {gamma.shape}, basis_a {a.shape}, basis_b {b.shape}"
            n, rank = need_axes(rows, 2, module, "randlora_lambda").shape
            shape = r.weight(f"{module}.weight", "RandLoRA").shape
            most, least = max(shape), min(shape)
            if b.shape[2:] != (rank,) or a.shape[1:2] != (rank,):
                what = "a fused RandLoRA layer (enable_lora), or another dialect"
                raise UnsupportedError(
                    what, parameter=module, expected="lambda (n, r), basis_b (n, most, r)", got=shapes
                )
            if gamma.shape != (n, least) or b.shape[0] < n or b.shape[1] < most or a.shape[2] < least:
                raise FormatError("the bases do not fit the weight", parameter=module, expected=shape, got=shapes)
            scale = r.number("alpha") / rank / sqrt(n)
            update = made(shape, [rows, gamma, a, b], partial(product, shape))
            r.add(f"{module}.weight", Dense(update, scale), keyed(parts))


def product(shape: tuple[int, ...], rows: Array, gamma: Array, a: Array, b: Array) -> Array:
    """Return the product of the flattened bases in the weight's shape; the code flattens them in two orders."""
    xp, (n, rank), most, least = namespace(rows), rows.shape, max(shape), min(shape)
    wide = rows[:, :, None] * a[: (n if a.shape[0] > 1 else 1), :, :least] * gamma[:, None, :]  # (n, r, least)
    left = xp.permute_dims(b[:n, :most, :], (1, 0, 2)).reshape(most, n * rank)
    right = xp.permute_dims(wide, (1, 0, 2)).reshape(rank * n, least)
    return (left @ right).reshape(shape)
