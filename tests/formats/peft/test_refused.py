"""Every type that PEFT knows is read, or refused with a sentence of its own."""

from __future__ import annotations

import numpy as np
import pytest

import loratools as lt
from loratools.errors import UnsupportedError
from loratools.formats.peft.refused import REASONS


@pytest.mark.parametrize("name", REASONS)
def test_the_reason_is_said(name: str) -> None:
    tensors = {"base_model.model.x.weight": np.zeros((2, 2), np.float32)}
    with pytest.raises(UnsupportedError) as error:
        lt.from_state_dict(tensors, {"peft_type": name})
    assert REASONS[name][0] in str(error.value)


def test_no_two_reasons_are_one() -> None:
    assert len({why for why, _ in REASONS.values()}) == len(REASONS)
