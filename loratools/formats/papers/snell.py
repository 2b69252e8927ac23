"""KLoRA, SNELL and SNELLA (arXiv:2411.01800): updates from distances between learned points, sparsified.

``<path>.additional_<layer>.learnable.In_Qs`` (h, in, q), ``Out_Qs`` (h, out, q), ``shared_coeff_fc`` (h, 1, 1).
K (in, out) = sum_h c_h ||In_Qs[h, i] - Out_Qs[h, o]||_p. KLoRA: D = K^T. SNELL: D = (K o |K| o 1[|K| > t])^T, where t
is the ``threshold`` quantile of |K|: the code multiplies by |K|, it does not only mask. SNELLA (with ``alpha``,
``gamma``, ``beta``): K + alpha softmax(K / gamma over out) + beta first, p = 2, thresholds per layer in a JSON file.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from loratools.core.lazy import computed
from loratools.core.update import Leaf
from loratools.errors import FormatError, UnsupportedError
from loratools.formats.pairs import number
from loratools.formats.papers.system import Reading, System, keyed, modules, need, of_model, system
from loratools.kinds.dense import Dense
from loratools.leaf import Array
from loratools.linalg.namespace import to_numpy, up

_KEY = r"(?P<module>.+\.additional_\w+)\.learnable\.(?P<leaf>\w+)"
_BASIC, _MORE = ("In_Qs", "Out_Qs", "shared_coeff_fc"), ("alpha", "gamma", "beta")
BLOCK = 64  # rows of K at a time: a difference of every pair of points is formed


@system("snell")
class Snell(System):
    """Kernels of learned points."""

    settings = ("variant", "norm_p", "threshold")
    files = ("thresholds",)

    def claims(self, tensors: Mapping[str, Leaf]) -> bool:
        """Claim In_Qs under a learnable."""
        return any(key.endswith(".learnable.In_Qs") for key in tensors)

    def carries(self, key: str) -> bool:
        """Carry the rest of the model: the whole of it is saved."""
        return of_model(key)

    def read(self, r: Reading) -> None:
        """Add the kernel of every layer."""
        found = modules(r.tensors, _KEY)
        for module, parts in found.items():
            path, _, layer = module.rpartition(".additional_")
            if unknown := parts.keys() - {*_BASIC, *_MORE}:
                raise UnsupportedError("another dialect of SNELL", parameter=module, got=", ".join(unknown))
            more = [leaf for leaf in _MORE if leaf in parts]
            if more and len(more) < len(_MORE):
                need(parts, module, *_MORE)
            inner, outer, coefficients = need(parts, module, *_BASIC)
            heads, n, q = inner.shape if len(inner.shape) == 3 else (0, 0, 0)
            if len(outer.shape) != 3 or (outer.shape[0], outer.shape[2], coefficients.shape) != (
                heads,
                q,
                (heads, 1, 1),
            ):
                expected, got = "In_Qs (h, in, q), Out_Qs (h, out, q), shared_coeff_fc (h, 1, 1)", outer.shape
                raise FormatError("the points of a kernel do not fit", parameter=module, expected=expected, got=got)
            extra = [number(parts[leaf][1]) for leaf in _MORE] if more else None
            how = self._how(r, f"{path}.{layer}", bool(more))
            update = Dense(computed((outer.shape[1], n), partial(kernel, inner, outer, coefficients, extra, *how)))
            r.add(f"{path}.{layer}.weight", update, keyed(parts))

    def _how(self, r: Reading, layer: str, alpha: bool) -> tuple[float, float | None]:
        """Return the order of the norm, and the share of entries that fall away (None: KLoRA keeps all)."""
        if alpha:
            return 2.0, _threshold(r.files.get("thresholds"), layer, r)
        p = r.number("norm_p")
        if r.word("variant", ("snell", "klora")) == "klora":
            return p, None
        return p, _share(r.number("threshold"), layer)


def _threshold(said: Any, layer: str, r: Reading) -> float:
    """Return a layer's threshold: from the JSON file by its name or the end of it, else from the settings."""
    if said is None:
        return _share(r.number("threshold", hint=', or files = {thresholds = "alloc_volume_dict.json"}'), layer)
    names = [key for key in said if layer == key or layer.endswith(f".{key}")]
    value = said[names[0]] if len(names) == 1 else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        expected, got = f"one number for {layer}", ", ".join(list(said)[:3])
        raise FormatError("the file of thresholds does not say this layer's", expected=expected, got=got)
    return _share(float(value), layer)


def _share(value: float, layer: str) -> float:
    if not 0 <= value <= 1:
        raise FormatError("a threshold is a quantile", parameter=layer, expected="0 to 1", got=value)
    return value


def kernel(
    inner: Leaf, outer: Leaf, coefficients: Leaf, extra: list[float] | None, p: float, threshold: float | None
) -> Array:
    """Return the update (out, in) in fp32; O(h in out q)."""
    a, b, c = (to_numpy(up(t, "float64")) for t in (inner, outer, coefficients))
    k = np.zeros((a.shape[1], b.shape[1]))
    for head in range(a.shape[0]):
        for start in range(0, a.shape[1], BLOCK):
            gaps = np.abs(a[head, start : start + BLOCK, None, :] - b[head, None, :, :])
            k[start : start + BLOCK] += float(c[head].item()) * (gaps**p).sum(axis=2) ** (1 / p)
    if extra is not None:
        alpha, gamma, beta = extra
        e = np.exp(k / gamma - (k / gamma).max(axis=1, keepdims=True))
        k = k + alpha * e / e.sum(axis=1, keepdims=True) + beta
    if threshold is not None:
        size = np.abs(k)
        k = np.where(size > np.quantile(size, threshold), k * size, 0.0)
    return k.T.astype(np.float32)
