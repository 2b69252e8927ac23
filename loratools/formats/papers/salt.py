"""SALT (arXiv:2503.16055): leading singular values scaled and shifted, the others mixed by a low-rank product.

``<module>.weight`` (the frozen W), ``trainable_scale_A`` a (k,), ``trainable_shift_B`` b (k,), ``trainable_X``
(m - k, r), ``trainable_Y`` (r, m - k), m = min(out, in). With W = U S V^T the code computes U relu(N) V^T for
N = blockdiag(diag(a s + b), diag(s') + X Y): the relu acts on every entry, so the change has full rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import prod

import numpy as np

from loratools.core.lazy import computed
from loratools.core.update import Leaf
from loratools.errors import FormatError, UnsupportedError
from loratools.formats.papers.system import (
    Reading,
    System,
    keyed,
    modules,
    need,
    need_axes,
    need_shape,
    of_model,
    system,
)
from loratools.kinds.dense import Dense
from loratools.leaf import Array
from loratools.linalg.namespace import to_numpy, up

_LEAVES = ("trainable_scale_A", "trainable_shift_B", "trainable_X", "trainable_Y")
SIGNS = (
    "SALT's singular vectors are not in the file: they are computed anew from W, and a pair of another sign than in "
    "training changes the update; check the result, or convert where it was trained"
)


@system("salt")
class Salt(System):
    """Singular values edited."""

    def claims(self, tensors: Mapping[str, Leaf]) -> bool:
        """Claim trainable_scale_A beside trainable_X."""
        return any(k.endswith(".trainable_scale_A") and f"{k[:-7]}X" in tensors for k in tensors)

    def carries(self, key: str) -> bool:
        """Carry the rest of the model: the whole of it is saved."""
        return of_model(key)

    def read(self, r: Reading) -> None:
        """Add U (relu(N) - S) V^T for every module."""
        found = modules(r.tensors, r"(?P<module>.+)\.(?P<leaf>trainable_\w+)")
        inside = {module for module in found if f"{module}.weight" in r.tensors}
        r.place(f"{module}.weight" for module in found if module not in inside)
        for module, parts in found.items():
            name = f"{module}.weight"
            if unknown := parts.keys() - set(_LEAVES):
                what = "another dialect of SALT"
                raise UnsupportedError(what, parameter=module, expected=", ".join(_LEAVES), got=", ".join(unknown))
            scale, shift, x, y = need(parts, module, *_LEAVES)
            w = r.tensors[name] if module in inside else r.weight(name, "SALT")
            if len(w.shape) < 2:
                raise FormatError("SALT edits matrices", parameter=name, expected="(out, in, ...)", got=w.shape)
            need_axes(scale, 1, module, "trainable_scale_A")
            need_axes(x, 2, module, "trainable_X")
            rest = min(w.shape[0], prod(w.shape[1:])) - scale.shape[0]
            if x.shape[0] != rest:
                expected, got = f"X of {rest} rows (min(out, in) - k)", x.shape
                raise UnsupportedError("another dialect of SALT", parameter=module, expected=expected, got=got)
            need_shape(shift, scale.shape, module, "trainable_shift_B")
            need_shape(y, x.shape[::-1], module, "trainable_Y")
            held = keyed(parts) | ({name: w} if module in inside else {})
            r.add(name, Dense(computed(w.shape, partial(edited, w, scale, shift, x, y))), held)
        r.remarks.append(SIGNS)


def edited(w: Leaf, scale: Leaf, shift: Leaf, x: Leaf, y: Leaf) -> Array:
    """Return U (relu(N) - S) V^T in fp32; the decomposition is that of W in fp32, as torch computes it."""
    flat = to_numpy(up(w)).reshape(w.shape[0], -1)
    left, s, right = (part.astype(np.float64) for part in np.linalg.svd(flat, full_matrices=False))
    a, b, p, q = (to_numpy(up(t, "float64")) for t in (scale, shift, x, y))
    k = a.shape[0]
    n = np.zeros((s.size, s.size))
    n[:k, :k], n[k:, k:] = np.diag(a * s[:k] + b), np.diag(s[k:]) + p @ q
    return ((left @ (np.maximum(n, 0.0) - np.diag(s))) @ right).astype(np.float32).reshape(w.shape)
