"""Uni-LoRA's own code for understanding tasks (arXiv:2506.00799): y += x A B with entries out of one vector.

``<module>.project_params_A`` (in, r) and ``_B`` (r, out) are places in ``<module>.vector_bank`` (d,), ``norm_factor_A``
and ``_B`` their factors. The fork of PEFT by the same authors is read as ``peft_type: UNILORA``.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratools.core.lazy import computed
from loratools.core.update import Leaf
from loratools.errors import FormatError
from loratools.formats.papers.system import Reading, System, keyed, modules, need, need_shape, of_model, system
from loratools.kinds.lowrank import LowRank
from loratools.leaf import Array
from loratools.linalg.namespace import cast, namespace, up

_LEAVES = ("project_params_A", "project_params_B", "norm_factor_A", "norm_factor_B", "vector_bank")
_KEY = rf"(?P<module>.+)\.(?P<leaf>{'|'.join(_LEAVES)})"


@system("unilora")
class UniLora(System):
    """Factors gathered from a vector."""

    def claims(self, tensors: Mapping[str, Leaf]) -> bool:
        """Claim project_params_A."""
        return any(key.endswith(".project_params_A") for key in tensors)

    def carries(self, key: str) -> bool:
        """Carry the frozen model and its head, where they are saved, too."""
        return of_model(key)

    def read(self, r: Reading) -> None:
        """Add (A B)^T of every module."""
        for module, parts in modules(r.tensors, _KEY).items():
            places_a, places_b, norm_a, norm_b, bank = need(parts, module, *_LEAVES)
            need_shape(norm_a, places_a.shape, module, "norm_factor_A")
            need_shape(norm_b, places_b.shape, module, "norm_factor_B")
            b, a = gathered(bank, places_b, norm_b).T, gathered(bank, places_a, norm_a).T
            r.add(f"{module}.weight", LowRank(b, a), keyed(parts))


def gathered(bank: Leaf, places: Leaf, norms: Leaf) -> Leaf:
    """Return bank[places] * norms, of the shape of the places, when it is read."""

    def gather() -> Array:
        vector = up(bank)
        index = cast(places.read(), "int64").reshape(-1)
        if int(index.min()) < 0 or int(index.max()) >= vector.shape[0]:
            expected, got = f"places 0 to {vector.shape[0] - 1}", f"{int(index.min())} to {int(index.max())}"
            raise FormatError("a place outside the vector of values", expected=expected, got=got)
        return namespace(vector).take(vector, index).reshape(places.shape) * up(norms)

    return computed(places.shape, gather)
