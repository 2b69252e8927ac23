"""The registry: settings are checked once, by name, type and range."""

from __future__ import annotations

import pytest

from loratools.errors import UsageError
from loratools.fusion.base import FUSIONS, Parameter


def test_unknown_names_come_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match="unknown fusion method") as caught:
        FUSIONS["tie"]
    assert caught.value.hint == "did you mean 'ties'?"
    with pytest.raises(UsageError, match="no parameter 'densty'") as caught:
        FUSIONS["ties"].settings({"densty": "0.3"})
    assert caught.value.hint == "did you mean 'density'?"


@pytest.mark.parametrize("value", ["0", "1.1", "-0.2", "nan", "inf", "a", "", None, True])
def test_values_out_of_range_are_refused(value: object) -> None:
    with pytest.raises(UsageError, match="wrong value of density"):
        FUSIONS["ties"].settings({"density": value})


def test_text_becomes_typed_values() -> None:
    assert FUSIONS["ties"].settings({"density": "0.3"}) == {"density": 0.3, "sign": "total", "scale": 1.0}
    assert FUSIONS["multislerp"].settings({"normalize": "no"}) == {"normalize": False}
    assert FUSIONS["null-space"].settings({"keep": "3"})["keep"] == 3
    assert FUSIONS["null-space"].settings({"keep": "none"})["keep"] is None


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [
        ("null-space", "keep", "2.5"),
        ("ties", "sign", "count"),
        ("multislerp", "normalize", "perhaps"),
        ("tucker", "rank", "0"),
    ],
)
def test_wrong_types_and_choices_are_refused(method: str, name: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"wrong value of {name}"):
        FUSIONS[method].settings({name: value})


def test_what_may_be_given_is_said_in_words() -> None:
    assert FUSIONS["ties"].parameters["density"].allowed == "a number > 0 and <= 1"
    assert FUSIONS["null-space"].parameters["keep"].allowed == "an integer >= 1, or none"
    assert Parameter("x", bool, True).allowed == "true | false"


def test_the_number_of_adapters_is_checked() -> None:
    with pytest.raises(UsageError, match="wrong number of adapters"):
        FUSIONS["slerp"].check_count(3)
    FUSIONS["linear"].check_count(100)
