"""LoLDU (arXiv:2410.13618): the leading diagonal of W = P L D U retrained; ``minloldu`` saves it alone.

``<module>.parametrizations.weight.0.vector_z`` (r,). D = s P L[:, :r] diag(z - d) U[:r] with U's rows divided by its
diagonal d, which needs W; s = alpha / r, or ``scaling_factor`` where a full state dict holds it. The residual in
``.original`` is not W.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from loratools.core.lazy import computed
from loratools.core.update import Leaf
from loratools.errors import FormatError, NumericsError
from loratools.formats.pairs import number
from loratools.formats.papers.system import Reading, System, keyed, modules, need, system
from loratools.kinds.lowrank import LowRank
from loratools.leaf import Array
from loratools.linalg.namespace import to_numpy, up

_KEY = r"(?P<module>.+)\.parametrizations\.weight\.0\.(?P<leaf>\w+)"
_OTHERS = ("lora_A", "lora_B", "P", "scaling_factor", "layer_weights")
TOLERANCE = 1e-5  # of ||P L D U - W|| over ||W||: fp32 rounding leaves 1e-6


@system("loldu")
class LoLdu(System):
    """Diagonals of an LU decomposition."""

    settings = ("alpha",)

    def claims(self, tensors: Mapping[str, Leaf]) -> bool:
        """Claim any vector_z of a parametrization."""
        return any(key.endswith(".parametrizations.weight.0.vector_z") for key in tensors)

    def carries(self, key: str) -> bool:
        """Carry the frozen factors and the residual of a full state dict."""
        return re.fullmatch(rf".+\.parametrizations\.weight\.(original|0\.({'|'.join(_OTHERS)}))", key) is not None

    def read(self, r: Reading) -> None:
        """Add s P L[:, :r] diag(z - d) U[:r] for every module."""
        found = {m: p for m, p in modules(r.tensors, _KEY).items() if "vector_z" in p}
        r.place(f"{module}.weight" for module in found)
        for module, parts in found.items():
            name = f"{module}.weight"
            (z,), w = need(parts, module, "vector_z"), r.weight(name, "LoLDU")
            if len(w.shape) != 2 or len(z.shape) != 1 or not 1 <= z.shape[0] <= min(w.shape):
                raise FormatError("the diagonal does not fit the weight", parameter=name, expected=w.shape, got=z.shape)
            scaling = parts.get("scaling_factor")
            scale = number(scaling[1]) if scaling else r.number("alpha") / z.shape[0]
            r.add(name, _update(name, z, w, scale), keyed({k: v for k, v in parts.items() if k == "vector_z"}))


def _update(name: str, z: Leaf, w: Leaf, scale: float) -> LowRank:
    rank, kept = z.shape[0], dict[str, tuple[Array, Array]]()

    def factors() -> tuple[Array, Array]:
        if "once" not in kept:
            kept["once"] = _factors(name, to_numpy(up(w)), to_numpy(up(z, "float64")))
        return kept["once"]

    b = computed((w.shape[0], rank), lambda: factors()[0])
    return LowRank(b, computed((rank, w.shape[1]), lambda: factors()[1]), scale)


def _factors(name: str, w: Array, z: Array) -> tuple[Array, Array]:
    """Return P L[:, :r] diag(z - d) and U[:r] with a unit diagonal; pivots are those of W in fp32, as torch has it."""
    from scipy.linalg import lu  # one decomposition per module, when it is used

    left, upper = lu(w, permute_l=True)
    left, upper, d = left.astype(np.float64), upper.astype(np.float64), np.diag(upper).astype(np.float64)
    if np.linalg.norm(left @ upper - w) > TOLERANCE * np.linalg.norm(w) or not np.all(d[: z.shape[0]]):
        raise NumericsError("the LU decomposition of this weight is not trustworthy", parameter=name)
    rank = z.shape[0]
    b, a = left[:, :rank] * (z - d[:rank]), upper[:rank] / d[:rank, None]
    return b.astype(np.float32), a.astype(np.float32)
