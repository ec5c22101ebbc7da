"""Turns, medians and what makes a comparison void."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undercroft.bench.rounds import UNSTEADY, Turns, spread, take_turns, until_steady
from undercroft.errors import InvalidInput

positive = st.floats(min_value=1e-3, max_value=1e6)


def test_a_spread_is_the_median_and_the_outer_tenths() -> None:
    found = spread([float(value) for value in range(11)])
    assert (found.p10, found.median, found.p90) == (1.0, 5.0, 9.0)
    assert str(spread([2.0])) == "2.000 [2.000, 2.000]"


@given(st.lists(positive, min_size=1))
def test_a_spread_lies_between_the_extremes_in_order(values: list[float]) -> None:
    found = spread(values)
    slack = 1e-9 * max(values)
    assert min(values) - slack <= found.p10 <= found.median + slack
    assert found.median - slack <= found.p90 <= max(values) + slack


def test_no_values_have_no_median() -> None:
    with pytest.raises(InvalidInput, match="at least one round"):
        spread([])


@pytest.mark.parametrize(
    ("values", "steady"),
    [([1.0, 1.0, 1.0], True), ([1.0, UNSTEADY], True), ([1.0, 1.0, 2.0], False), ([0.0, 1.0], False)],
)
def test_values_far_apart_are_not_steady(values: list[float], steady: bool) -> None:
    assert spread(values).is_steady() is steady


def test_each_round_begins_with_another_way() -> None:
    order: list[str] = []

    def way(name: str) -> Callable[[], int]:
        return lambda: order.append(name) or len(order)

    told: list[int] = []
    turns = take_turns({name: way(name) for name in "abc"}, rounds=3, on_round=told.append)
    assert "".join(order) == "abcbcacab"
    assert turns.samples == {"a": (1, 6, 8), "b": (2, 4, 9), "c": (3, 5, 7)}
    assert told == [1, 2, 3]


def test_a_ratio_is_taken_within_its_round() -> None:
    turns = Turns(samples={"ours": (1.0, 20.0, 3.0), "theirs": (2.0, 10.0, 6.0)})
    assert turns.ratio("ours", "theirs", float).median == 0.5


def test_a_reference_that_varies_voids_and_says_how_often_it_was_tried() -> None:
    turns = Turns(samples={"raw": (1.0, 2.0, 3.0)}, attempts=3)
    reason = turns.why_void("raw", float)
    assert "raw alone varied by 2.33x" in reason
    assert "3 times" in reason
    assert Turns(samples={"raw": (1.0, 1.1)}).why_void("raw", float) == ""


def test_rounds_are_repeated_until_the_reference_is_steady() -> None:
    series = iter([(1.0, 9.0), (1.0, 5.0), (2.0, 2.0), (1.0, 1.0)])
    turns = until_steady(lambda: Turns(samples={"raw": next(series)}), "raw", float, attempts=4)
    assert turns.samples["raw"] == (2.0, 2.0)
    assert turns.attempts == 3


def test_patience_ends_and_the_last_rounds_stay_void() -> None:
    series = iter([(1.0, 9.0), (1.0, 5.0), (2.0, 2.0)])
    turns = until_steady(lambda: Turns(samples={"raw": next(series)}), "raw", float, attempts=2)
    assert turns.samples["raw"] == (1.0, 5.0)
    assert "2 times" in turns.why_void("raw", float)
