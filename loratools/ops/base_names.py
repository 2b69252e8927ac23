"""Which base parameter belongs to which update: settled, with shapes, before anything is read."""

from __future__ import annotations

from collections.abc import Mapping

from loratools.core.adapter import Adapter
from loratools.core.update import Update
from loratools.errors import MismatchError
from loratools.io.base import Base
from loratools.io.quantised import refuse_gguf, refuse_quantised


def base_names(adapter: Adapter, base: Base, *, skip_missing: bool = False) -> tuple[Mapping[str, str], list[str]]:
    """Return adapter name -> base name, and the names that the base lacks.

    Parameters stored whole may be new (heads); others may be missing only with ``skip_missing``. Raises MismatchError
    with the first three and the count, UnsupportedError for a quantised base.
    """
    if base.path is not None:
        refuse_gguf(base.path)
    refuse_quantised(base, model_id=adapter.meta.base_id)
    may_lack = [name for name, u in adapter.items() if skip_missing or u.kind == "replace"]
    try:
        names = base.resolve(adapter, may_lack)
    except MismatchError as error:
        if not skip_missing:
            error.hint = "; ".join(filter(None, (error.hint, "--skip-missing leaves out what the base lacks")))
        raise
    wrong = [name for name, target in names.items() if _misfits(adapter[name], base.shapes[target])]
    if wrong:
        first = "; ".join(f"{n} {adapter[n].shape}, base {base.shapes[names[n]]}" for n in wrong[:3])
        raise MismatchError(f"{len(wrong)} of {len(names)} parameters have another shape in the base", got=first)
    return names, [name for name in adapter if name not in names]


def _misfits(update: Update, shape: tuple[int, ...]) -> bool:
    return update.kind not in ("replace", "replace_rows") and update.shape != shape
