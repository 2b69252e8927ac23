"""Network: a small network applied to the columns of the base, as PEANuT does (arXiv:2410.01870)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from loratools.core.coat import Coat
from loratools.core.update import Array, Delta, Leaf, kind, namespace, shape_of, working_dtype
from loratools.errors import FormatError
from loratools.kinds.lowrank import LowRank
from loratools.linalg import seeds
from loratools.linalg.namespace import up


def _sigmoid(x: Array) -> Array:
    xp = namespace(x)
    return 0.5 * (1.0 + xp.tanh(0.5 * x))


def _relu(x: Array) -> Array:
    return namespace(x).where(x > 0, x, 0.0 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "linear": lambda x: x,
    "relu": _relu,
    "leaky_relu": lambda x: _relu(x) - 0.01 * _relu(-x),
    "relu2": lambda x: _relu(x) ** 2,
    "tanh": lambda x: namespace(x).tanh(x),
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "swish": lambda x: x * _sigmoid(x),
    "quick_gelu": lambda x: x * _sigmoid(1.702 * x),
    "gelu_new": lambda x: x * _sigmoid(2.0 * (2.0 / 3.141592653589793) ** 0.5 * (x + 0.044715 * x**3)),
    "gelu_pytorch_tanh": lambda x: x * _sigmoid(2.0 * (2.0 / 3.141592653589793) ** 0.5 * (x + 0.044715 * x**3)),
}
"""By the names that transformers gives them; a file keeps the position, so new ones go last."""


@kind("network")
class Network(Coat):
    """W' = W + scale * b f(a W), f acting on columns: b (m, r), a (r, m), of rank r at most.

    h_0 = act(a W); encoders h_i = act(E_i h_{i-1}), i = 1 ... d; decoders h = act(D_j h) + h_{d-j}, j = 1 ... d.
    ``layers`` (2 d, r, r) are E_1 ... E_d, D_1 ... D_d (None for d = 0); ``activation`` a position in
    :data:`ACTIVATIONS`.
    """

    b: Leaf | Array
    a: Leaf | Array
    shape: tuple[int, ...]
    layers: Leaf | Array | None = None
    scale: float = 1.0
    activation: int = 1

    def __post_init__(self) -> None:
        (m, r), layers = shape_of(self.b), () if self.layers is None else shape_of(self.layers)
        if shape_of(self.a) != (r, m) or m != self.shape[0] or layers[1:] not in ((), (r, r)):
            got = f"b {shape_of(self.b)}, a {shape_of(self.a)}, layers {layers}"
            raise FormatError("the layers of the network do not fit", expected=f"{self.shape[0]} rows, one r", got=got)
        if not 0 <= self.activation < len(ACTIVATIONS):
            raise FormatError("unknown activation", expected=f"below {len(ACTIVATIONS)}", got=self.activation)

    def delta(self, w: Array) -> Delta:
        """Return scale * b f(a W) as factors; O(m n r)."""
        base = self.checked(w)
        dtype, act = working_dtype(base), list(ACTIVATIONS.values())[self.activation]
        h = act(up(self.a, dtype) @ base.reshape(base.shape[0], -1))
        layers = [] if self.layers is None else list(up(self.layers, dtype))
        half, before = len(layers) // 2, []
        for encode in layers[:half]:
            before.append(h)
            h = act(encode @ h)
        for decode in layers[half:]:
            h = act(decode @ h) + before.pop()
        return LowRank(up(self.b, dtype), h, self.scale, self.shape)

    @classmethod
    def example(cls, seed: int) -> Self:
        """A network of width 3 and depth 1 on a 5 x 7 parameter."""
        b, a, layers = (
            seeds.uniform(seeds.key_of(seed, f"network.{i}"), *size) - 0.5
            for i, size in enumerate(((5, 3), (3, 5), (6, 3)))
        )
        return cls(b, a, (5, 7), layers.reshape(2, 3, 3))
