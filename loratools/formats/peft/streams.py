"""Random numbers that a file leaves out, drawn again as PEFT drew them: torch's CPU generator, or NumPy's PCG64.

Neither library promises that its streams stay as they are, so every recipe is compared with known numbers first, and
refused where it draws others. A file that holds its projections or indices needs none of this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from math import sqrt
from typing import Any

import numpy as np

from loratools.errors import MissingExtraError, UnsupportedError
from loratools.leaf import Array

_SEED = 17  # of the known numbers, which torch 2.13 and NumPy 2.4 drew
_KNOWN: Mapping[str, tuple[float, ...]] = {
    "uniform": (-0.13151752948760986, 0.07021915912628174, 0.6604174375534058, -0.7522728443145752),
    "rand": (0.43424123525619507, 0.5351095795631409, 0.8302087187767029, 0.1238635778427124),
    "bfloat16": (-0.1318359375, 0.0703125, 0.66015625, -0.75390625),
    "normal": (-1.0461914539337158, 1.2305212020874023, -1.1596639156341553, 0.6123930811882019),
    "short normal": (-1.41351318359375, 0.23363074660301208, 0.03403318300843239, 0.3499172627925873),
    "permutation": (559, 97, 591, 346),
    "choice": (557, 107, 160, 737),
    "shuffle": (4, 8, 2, 3),
}
LARGEST = (1 << 32) // 20  # beyond it torch permutes in another way, too large to compare with known numbers


class Torch:
    """torch's generator on the CPU, seeded; arrays are NumPy's, fp32. Raises :class:`MissingExtraError` without torch.

    ``alternative`` is what the user can do instead: how to save a file that needs no generator.
    """

    def __init__(self, seed: int, alternative: str) -> None:
        self.torch = _torch(alternative)
        self.generator = self.torch.Generator(device="cpu").manual_seed(seed)

    def uniform(self, shape: tuple[int, ...], bound: float, dtype: str = "float32") -> Array:
        """Return uniform numbers in +-bound, drawn in fp32 or in bf16."""
        _need_known("uniform" if dtype == "float32" else "bfloat16")
        drawn = self.torch.empty(shape, dtype=getattr(self.torch, dtype))
        return _numpy(drawn.uniform_(-bound, bound, generator=self.generator))

    def bases(self, shape: tuple[int, int, int], pieces: int) -> Array:
        """Return ``pieces`` draws of ``shape`` side by side on axis 1 over their deviation, all in bf16 but the result.

        A draw is Kaiming's with a = sqrt(5): uniform in +-1 / sqrt(the product of the last two sizes).
        """
        _need_known("bfloat16")
        bound = sqrt(3.0) * (sqrt(2.0 / 6.0) / sqrt(shape[1] * shape[2]))
        empty = [self.torch.empty(shape, dtype=self.torch.bfloat16) for _ in range(pieces)]
        drawn = self.torch.cat([x.uniform_(-bound, bound, generator=self.generator) for x in empty], dim=1)
        return _numpy(drawn / drawn.std())

    def signs(self, shape: tuple[int, ...], sparsity: float) -> Array:
        """Return -1, 0 and 1 over their deviation, one in ``sparsity`` not 0."""
        _need_known("rand")
        drawn = self.torch.rand(shape, generator=self.generator)
        found = (drawn > 1 - 1 / (2 * sparsity)).float() - (drawn < 1 / (2 * sparsity)).float()
        return _numpy(found / found.std())

    def normal(self, shape: tuple[int, ...], std: float) -> Array:
        """Return normal numbers of this standard deviation; torch draws fewer than 16 in another way."""
        _need_known("normal" if np.prod(shape) >= 16 else "short normal")
        return _numpy(self.torch.normal(mean=0.0, std=std, size=shape, generator=self.generator))

    def permutation(self, n: int) -> Array:
        """Return a permutation of 0 .. n - 1, int64."""
        if n >= LARGEST:
            what = "indices of so large a weight are drawn in a way that cannot be checked"
            raise UnsupportedError(what, expected=f"fewer than {LARGEST} entries", got=n)
        _need_known("permutation")
        return self.torch.randperm(n, generator=self.generator).numpy()


def shuffled(choices: int, size: int, seed: int) -> Array:
    """Return ``size`` numbers below ``choices``, each equally often but for a chosen rest, shuffled (PCG64), int64."""
    for recipe in ("choice", "shuffle"):
        _need_known(recipe)
    drawn = np.random.default_rng(seed)
    numbers = np.repeat(np.arange(choices), size // choices)
    if size % choices:
        numbers = np.concatenate([numbers, drawn.choice(choices, size=size % choices, replace=False)])
    drawn.shuffle(numbers)
    return numbers


def _torch(alternative: str) -> Any:
    try:
        import torch
    except ImportError as error:
        what = "this file leaves out random numbers that only torch draws again"
        raise MissingExtraError(what, hint=f"pip install 'loratools[torch]', or {alternative}") from error
    return torch


def _numpy(drawn: Any) -> Array:
    return drawn.float().numpy()


@cache
def _need_known(recipe: str) -> None:
    """Raise :class:`UnsupportedError` unless the recipe draws the known numbers."""
    drawn, known = _DRAWS[recipe](), _KNOWN[recipe]
    if tuple(float(x) for x in drawn[: len(known)]) != tuple(float(x) for x in known):
        library = "numpy" if recipe in ("choice", "shuffle") else "torch"
        raise UnsupportedError(
            f"this version of {library} draws other random numbers than the one that wrote the file",
            expected=f"{recipe}: {known}",
            got=tuple(float(x) for x in drawn[: len(known)]),
            hint="save the adapter again with its projections or indices",
        )


def _drawn(draw: Callable[[Any, Any], Any]) -> Array:
    import torch

    return _numpy(draw(torch, torch.Generator(device="cpu").manual_seed(_SEED)))


def _shuffled() -> Array:
    numbers = np.arange(10)
    drawn = np.random.default_rng(_SEED)
    drawn.choice(1000, size=6, replace=False)
    drawn.shuffle(numbers)
    return numbers


_DRAWS: Mapping[str, Callable[[], Array]] = {
    "uniform": lambda: _drawn(lambda torch, g: torch.empty(6).uniform_(-1, 1, generator=g)),
    "rand": lambda: _drawn(lambda torch, g: torch.rand(6, generator=g)),
    "bfloat16": lambda: _drawn(lambda torch, g: torch.empty(6, dtype=torch.bfloat16).uniform_(-1, 1, generator=g)),
    "normal": lambda: _drawn(lambda torch, g: torch.normal(0.0, 1.0, (18,), generator=g)),
    "short normal": lambda: _drawn(lambda torch, g: torch.normal(0.0, 1.0, (6,), generator=g)),
    "permutation": lambda: _drawn(lambda torch, g: torch.randperm(1000, generator=g)),
    "choice": lambda: np.random.default_rng(_SEED).choice(1000, size=6, replace=False),
    "shuffle": _shuffled,
}
