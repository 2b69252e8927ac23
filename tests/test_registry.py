from __future__ import annotations

import pytest

from loratools.errors import UsageError
from loratools.registry import Registry


def test_discovers_and_suggests() -> None:
    from loratools.core.update import KINDS

    assert "lowrank" in KINDS
    assert list(KINDS) == sorted(KINDS)
    with pytest.raises(UsageError, match="unknown kind 'lowrnk'") as caught:
        KINDS["lowrnk"]
    assert caught.value.hint == "did you mean 'lowrank'?"


def test_a_name_has_one_owner() -> None:
    things: Registry[int] = Registry("loratools.kinds", "thing")
    things.add("x")(1)
    with pytest.raises(ValueError, match="two things named 'x'"):
        things.add("x")(2)
