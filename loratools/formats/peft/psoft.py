"""``peft_type: PSOFT``: W' = W + B (R - 1) A, a rotation inside the leading singular subspace of W (``PsoftConfig``).

B A are the r leading singular triplets of W (``psoft_init``: U diag(s), V^T; ``pissa_init``: the roots of s on both
sides). R = diag(b) (1 + Q)(1 - Q)^-1 diag(a), Q from ``psoft_R.weight`` (r (r - 1) / 2); without ``psoft_orth`` it is
the (r, r) tensor itself.

The signs of singular vectors change the update, and libraries choose them differently: they are taken from torch's SVD
on the CPU, as PEFT does when it loads the file there, and the reader says so. A file trained on another device may have
been trained with others, which nothing in it tells.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from loratools.core.lazy import computed
from loratools.core.update import Array, Update, namespace
from loratools.errors import FormatError, MissingExtraError, UnsupportedError
from loratools.formats.peft.fields import Fields
from loratools.formats.peft.forms.form import Remark
from loratools.formats.peft.tuner import Model, Module, Size, Tuner
from loratools.formats.peft.types import peft_type
from loratools.kinds.lowrank import LowRank
from loratools.linalg.cayley import cayley, neumann, projected, skew
from loratools.linalg.namespace import down, to_numpy, up

R, LEFT, RIGHT = "psoft_R.weight", "psoft_R.vector_b", "psoft_R.vector_a"
POWER = {"psoft_init": 1.0, "pissa_init": 0.5}  # of the singular values, on the left side


@peft_type("PSOFT")
class Psoft(Tuner):
    """A rotation of the base's leading singular vectors, computed from the base that the file is read with."""

    type = "PSOFT"
    leaves = (R, LEFT, RIGHT)

    def size(self, m: Module) -> Size:
        """Return nothing: the tensors are those of the subspace."""
        return None, None

    def weight(self, m: Module) -> Update:
        """Return the factors, computed when they are read; the base is decomposed once for both."""
        f = m.fields
        if f.text("psoft_svd", "full") != "full":
            what = "psoft_svd='lowrank' is a randomised SVD: PEFT's own basis cannot be found again offline"
            raise UnsupportedError(what, parameter=m.path, hint="merge it with PEFT where it was trained")
        init = f.text("ab_svd_init", "psoft_init")
        if init not in POWER:
            raise FormatError("ab_svd_init is unknown", expected=", ".join(POWER), got=init)
        r, power, w = f.integer("r", least=1), POWER[init], m.base_leaf()
        (out, n), turn = m.shape, _turn(m, r)
        triplets = cache(lambda: _triplets(up(w).T if m.turned else up(w), r))

        def left() -> Array:
            u, s, _ = triplets()
            return (u * s**power) @ turn()

        def right() -> Array:
            _, s, vh = triplets()
            return (s ** (1.0 - power))[:, None] * vh

        return LowRank(computed((out, r), left), computed((r, n), right))

    def remarks(self, model: Model) -> list[Remark]:
        """Warn of the signs."""
        return ["PSOFT: the update depends on the signs of the base's singular vectors, here those of torch on the "
                "CPU: trained on another device, it may be another one"]  # fmt: skip


def _turn(m: Module, r: int) -> Callable[[], Array]:
    """Return the function that computes diag(b) R diag(a) - 1; what it needs is there."""
    f = m.fields
    stored = m.need(R, (r * (r - 1) // 2,) if f.flag("psoft_orth", True) else (r, r))
    left = m.need(LEFT, (r,)) if f.flag("psoft_mag_b", True) else None
    right = m.need(RIGHT, (r,)) if f.flag("psoft_mag_a", True) else None

    def compute() -> Array:
        raw = up(stored, "float64")
        eye = namespace(raw).eye(r, dtype=raw.dtype)
        turn = raw if raw.ndim == 2 else eye + _rotation(skew(raw.reshape(1, -1), r), f)[0, ...]
        turn = turn if left is None else up(left, "float64")[:, None] * turn
        turn = turn if right is None else turn * up(right, "float64")[None, :]
        return down(turn - eye, "float32")

    return compute


def _rotation(q: Array, f: Fields) -> Array:
    """Return R - 1 for skew-symmetric q (1, r, r)."""
    if not f.flag("use_cayley_neumann"):
        return cayley(-q)
    eps = f.number("cayley_neumann_eps") if f.config.get("cayley_neumann_eps") is not None else None
    return neumann(q if eps is None else projected(q, eps), f.integer("num_cayley_neumann_terms", 5))


def _triplets(w: Array, r: int) -> tuple[Array, Array, Array]:
    """Return U (out, r), s (r,), V^T (r, in) of torch's SVD on the CPU in fp32, whose signs are those of PEFT."""
    try:
        import torch
    except ImportError as error:
        what = "PSOFT's update depends on the signs of singular vectors, and they are torch's"
        raise MissingExtraError(what, hint="pip install 'loratools[torch]', or merge it with PEFT") from error
    found = torch.linalg.svd(torch.asarray(to_numpy(w)), full_matrices=False)
    u, s, vh = (to_numpy(t) for t in found)
    return u[:, :r], s[:r], vh[:r, :]
