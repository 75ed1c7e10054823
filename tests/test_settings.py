from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest

from lowcal.errors import LowcalError
from lowcal.settings import Count, Fraction, Limits, Settings, Whole, accepts, allowed, plain_types


@dataclass(frozen=True)
class Example(Settings):
    """A field of each kind."""

    share: Fraction = 0.5
    count: Count | None = None
    mode: Literal["fast", "slow"] = "fast"
    is_on: bool = False
    moves: Mapping[Whole, Whole] | None = None
    anything: Any = None
    call: Callable[[], int] | None = None


def test_a_whole_number_becomes_a_float_and_what_is_unknown_is_left_alone():
    example = Example(share=1, count=3, anything=2, call=len)
    assert (example.share, type(example.share), type(example.count)) == (1.0, float, int)
    assert (example.anything, example.call) == (2, len)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": 0}, "Example: share is 0; give a number, above 0 and at most 1"),
        ({"share": True}, "Example: share is True; give a number"),
        ({"share": float("nan")}, "Example: share is nan; give a number"),
        ({"count": 2.0}, "Example: count is 2.0; give a whole number, at least 1"),
        ({"count": True}, "Example: count is True; give a whole number"),
        ({"mode": "medium"}, "Example: mode is 'medium'; give 'fast' or 'slow'"),
        ({"is_on": 1}, "Example: is_on is 1; give true or false"),
        ({"moves": {1: -1}}, "Example: moves is {1: -1}; give a mapping"),
        ({"moves": [1]}, "Example: moves is [1]; give a mapping"),
    ],
    ids=str,
)
def test_a_value_that_the_annotation_does_not_allow_is_refused(values, message):
    with pytest.raises(LowcalError) as error:
        Example(**values)
    assert str(error.value).startswith(message)


def test_an_annotation_in_words_and_types():
    name = Annotated[str, Limits(least=1, unit=" character")]
    assert allowed(name) == "text, at least 1 character"
    assert (accepts(name, "a"), accepts(name, "")) == (True, False)
    assert allowed(Count | Literal["all", "none"] | None) == "a whole number, 'all' or 'none', at least 1"
    assert plain_types(Count | None) == {int, type(None)}
