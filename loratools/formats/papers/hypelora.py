"""HypeLoRA (arXiv:2603.19278): a shared network generates the factors of every layer from an embedding.

Under ``...layer.<i>.attention.self.query.lora_A.<adapter>.`` (and ``value``) lie ``hypernet.fc1.weight``, ``fc2``
(``fc3``, ``fc4``), ``hypernet.embedding.weight`` (2 L, e), one network under every module, ``initial_A`` (H, r) and
``initial_B`` (r, H). For embedding l: h = act(fc1(e_l)), ..., last(h) = B (r, H); in the mode "generated" A (H, r) too.
The module computes x A B, so lora_A = A^T and lora_B = B^T. Queries have the first L embeddings, values the others, in
the order of the layers.

The manifest says what no file does: ``alpha``, ``activation``, ``mode`` ("generated", with ``order`` of the two halves
of the output, or "fixed" with the matrices A.<l> (H, r) among the weights), and ``blend_A``, ``blend_B`` ("replace",
"add" with ``noise``, "multiply"). Mode "random" draws A anew for every input: there is no such update.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np

from loratools.core.lazy import computed
from loratools.core.update import Leaf
from loratools.errors import FormatError, UnsupportedError
from loratools.formats.papers.system import Reading, System, need, need_axes, of_model, system
from loratools.kinds.lowrank import LowRank
from loratools.leaf import Array
from loratools.linalg.namespace import to_numpy, up

_KEY = re.compile(
    r"(.+\.(\d+)\.attention\.self\.(query|value))\.lora_A\.(?:[^.]+\.)?(hypernet\..+|initial_A|initial_B)"
)
_BLENDS = ("replace", "add", "multiply")
Net = Mapping[str, tuple[str, Leaf]]


def _gelu(x: Array) -> Array:
    from scipy.special import erf

    return 0.5 * x * (1 + erf(x / np.sqrt(2.0)))


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {"relu": lambda x: np.maximum(x, 0.0), "gelu": _gelu}


@system("hypelora")
class HypeLora(System):
    """Factors out of a network."""

    settings = ("alpha", "activation", "mode", "order", "blend_A", "blend_B", "noise")

    def claims(self, tensors: Mapping[str, Leaf]) -> bool:
        """Claim a hypernet under a lora_A."""
        return any(".hypernet." in key and _KEY.fullmatch(key) for key in tensors)

    def carries(self, key: str) -> bool:
        """Carry the backbone and the classifier: the trainer saves the whole model."""
        return of_model(key) and ".hypernet." not in key

    def read(self, r: Reading) -> None:
        """Evaluate the network for every layer."""
        places: dict[tuple[str, int], dict[str, tuple[str, Leaf]]] = {}
        paths: dict[tuple[str, int], str] = {}
        for key, leaf in r.tensors.items():
            if m := _KEY.fullmatch(key):
                places.setdefault((m[3], int(m[2])), {})[m[4]] = (key, leaf)
                paths[m[3], int(m[2])] = m[1]
        mode = r.word("mode", ("generated", "fixed", "random"))
        if mode == "random":
            what = 'HypeLoRA in the mode "random" draws A anew for every input: no update says what it does'
            raise UnsupportedError(what, expected='mode = "generated" or "fixed"')
        for number, place in enumerate(sorted(places)):
            parts = places[place]
            if any(leaf.startswith(("hypernet.token_proj", "hypernet.transformer")) for leaf in parts):
                what = "HypeLoRA's transformer: only its fully connected generator is evaluated"
                raise UnsupportedError(what, parameter=paths[place])
            self._add(r, paths[place], parts, number, mode, len(places))

    def _add(self, r: Reading, path: str, parts: Net, number: int, mode: str, count: int) -> None:
        start_a, start_b, embedding = need(parts, path, "initial_A", "initial_B", "hypernet.embedding.weight")
        width, rank = need_axes(start_a, 2, path, "initial_A").shape
        if start_b.shape != (rank, width) or embedding.shape[0] != count:
            sizes = f"initial_A {start_a.shape}, initial_B {start_b.shape}"
            got = f"{sizes}, {embedding.shape[0]} embeddings, {count} modules"
            raise FormatError("the generator does not fit its modules", parameter=path, got=got)
        fixed = r.tensors.get(f"A.{number}") if mode == "fixed" else None
        if mode == "fixed" and (fixed is None or fixed.shape != (width, rank)):
            expected = f"A.{number} of shape {(width, rank)} among the weights"
            what, found = (
                "fixed matrices are not in HypeLoRA's checkpoints",
                "nothing" if fixed is None else fixed.shape,
            )
            raise FormatError(what, parameter=path, expected=expected, got=found)
        layers = sorted({leaf.split(".")[1] for leaf in parts if leaf.startswith("hypernet.fc")})
        stack = [need(parts, path, f"hypernet.{fc}.weight", f"hypernet.{fc}.bias") for fc in layers]
        act = ACTIVATIONS[r.word("activation", ACTIVATIONS)]
        halves = r.word("order", ("BA", "AB")) if mode == "generated" else "B"
        last = stack[-1][0].shape[0] if stack else 0
        if last != len(halves) * rank * width:
            raise FormatError(
                "the generator's output does not fit", parameter=path, expected=len(halves) * rank * width, got=last
            )
        blends = {
            side: (r.word(f"blend_{side}", _BLENDS, "replace"), start)
            for side, start in (("A", start_a), ("B", start_b))
        }
        noise = r.number("noise") if any(how == "add" for how, _ in blends.values()) else 0.0

        def generated(side: str) -> Array:
            if side == "A" and fixed is not None:
                made = to_numpy(up(fixed, "float64"))
            else:
                out = evaluate(stack, to_numpy(up(embedding, "float64"))[number], act, fixed)
                at = halves.index(side) * rank * width
                made = out[at : at + rank * width].reshape((width, rank) if side == "A" else (rank, width))
            how, start = blends[side]
            other = to_numpy(up(start, "float64"))
            done = (
                made if how == "replace" else made * other if how == "multiply" else (1 - noise) * made + noise * other
            )
            return done.astype(np.float32).T

        scale = r.number("alpha") / rank
        b, a = computed((width, rank), lambda: generated("B")), computed((rank, width), lambda: generated("A"))
        used = dict(parts.values()) | ({f"A.{number}": fixed} if fixed is not None else {})
        r.add(f"{path.removeprefix('base_model.model.')}.weight", LowRank(b, a, scale), used)


def evaluate(stack: list[list[Leaf]], start: Array, act: Callable[[Array], Array], fixed: Leaf | None) -> Array:
    """Return the network's output; where fc1 is wider than the embedding, the fixed A is its further input."""
    x = start
    if stack[0][0].shape[1] > start.size:
        if fixed is None or stack[0][0].shape[1] != start.size + fixed.shape[0] * fixed.shape[1]:
            raise FormatError("the generator's input does not fit", expected=start.size, got=stack[0][0].shape[1])
        x = np.concatenate([start, to_numpy(up(fixed, "float64")).reshape(-1)])
    for i, (weight, bias) in enumerate(stack):
        x = to_numpy(up(weight, "float64")) @ x + to_numpy(up(bias, "float64"))
        x = act(x) if i < len(stack) - 1 else x
    return x
