"""The governor: pure decisions about when reading ahead pays."""

from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undercroft.errors import InvalidInput
from undercroft.moe.governor import Governor, Limits, Totals, came_true

LIMITS = Limits(window=1, depth=2, longest_pause=8)
HALF_WAITED = Totals(seconds=1.0, waited=0.5, read=100)
GOOD = Totals(seconds=0.8, waited=0.3, read=100, predicted=60, useful=50)
BETTER = Totals(seconds=0.6, waited=0.1, read=100, predicted=60, useful=50)
NOT_USEFUL = Totals(seconds=0.8, waited=0.3, read=100, predicted=60, useful=20)
NO_GAIN = Totals(seconds=0.99, waited=0.49, read=100, predicted=60, useful=60)
SATURATED = Totals(seconds=0.5, waited=0.48, read=100, predicted=60, useful=60)
DEARER = Totals(seconds=1.0, waited=0.3, read=100, predicted=60, useful=50)
LUCKIER = Totals(seconds=0.8, waited=0.3, read=60, predicted=40, useful=35)
UNLUCKIER = Totals(seconds=1.0, waited=0.5, read=180, predicted=90, useful=80, wasted=5)
RESIDENT = Totals(seconds=1.0, waited=0.05)


def depths(governor: Governor, windows: Iterable[Totals]) -> list[int]:
    """The depth after each window."""
    totals, found = Totals(), list[int]()
    for window in windows:
        totals = totals.plus(window)
        governor.turn(totals)
        found.append(governor.depth)
    return found


def test_it_begins_off_and_goes_deeper_while_each_depth_pays() -> None:
    assert Governor().depth == 0
    assert depths(Governor(LIMITS), [HALF_WAITED, GOOD, GOOD, BETTER, BETTER, BETTER]) == [1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("window", [NOT_USEFUL, NO_GAIN, DEARER, LUCKIER, SATURATED, HALF_WAITED])
def test_a_depth_that_does_not_pay_is_left_after_one_window(window: Totals) -> None:
    assert depths(Governor(LIMITS), [HALF_WAITED, window]) == [1, 0]


def test_a_depth_is_kept_that_is_only_as_fast_because_more_was_wanted() -> None:
    assert depths(Governor(LIMITS), [HALF_WAITED, UNLUCKIER]) == [1, 1]


@pytest.mark.parametrize("window", [RESIDENT, SATURATED, Totals(seconds=1.0, waited=0.01, read=9), Totals()])
def test_nothing_is_tried_where_there_is_nothing_to_gain(window: Totals) -> None:
    assert set(depths(Governor(LIMITS), [window] * 20)) == {0}


def test_trials_that_fail_come_ever_more_rarely_and_never_cease() -> None:
    governor = Governor(LIMITS)
    totals, tried = Totals(), list[int]()
    for number in range(80):
        totals = totals.plus(NOT_USEFUL if governor.depth else HALF_WAITED)
        governor.turn(totals)
        if governor.depth:
            tried.append(number)
    pauses = [later - sooner for sooner, later in pairwise(tried)]
    assert pauses[:3] == [3, 5, 9]
    assert set(pauses[3:]) == {LIMITS.longest_pause + 1}


def test_a_depth_that_paid_is_tried_again_soon() -> None:
    governor = Governor(LIMITS)
    for _ in range(3):  # three failures, the next trial is far
        depths(governor, [HALF_WAITED] * 12)
    windows = [HALF_WAITED] * 12
    while governor.depth == 0:
        depths(governor, windows[:1])
    assert depths(governor, [GOOD, NOT_USEFUL])[-1] == 0
    assert 1 in depths(governor, [HALF_WAITED] * 3)


def test_what_happens_to_be_resident_for_a_while_is_no_failure() -> None:
    governor = Governor(LIMITS)
    assert depths(governor, [HALF_WAITED, RESIDENT, RESIDENT, HALF_WAITED]) == [1, 0, 0, 1]


def test_decisions_are_made_at_the_end_of_windows() -> None:
    governor = Governor(Limits(window=4))
    assert depths(governor, [HALF_WAITED] * 8) == [0, 0, 0, 1, 1, 1, 1, 0]


def test_what_never_comes_true_is_not_read_and_what_does_is_again() -> None:
    governor = Governor(LIMITS)
    assert len(governor.precisions(1, 1, 3)) == 3
    for _ in range(40):
        governor.judge(1, 1, [1.0, 0.0, 1.0])
    (best,) = governor.precisions(1, 1, 3)  # what is less likely than something unlikely is not, either
    assert best > 0.95
    assert len(governor.precisions(1, 2, 3)) == len(governor.precisions(2, 1, 3)) == 3
    for _ in range(40):
        governor.judge(1, 1, [1.0, 1.0, 1.0])
    assert len(governor.precisions(1, 1, 3)) == 3


def test_guesses_are_judged_rank_by_rank() -> None:
    assert list(came_true([[3, 1], [2, 0]], [[1, 3], [0, 5]])) == [0.5, 1.0]


@pytest.mark.parametrize("wrong", [{"depth": -1}, {"window": 0}, {"longest_pause": 0}])
def test_limits_that_limit_nothing(wrong: dict[str, int]) -> None:
    with pytest.raises(InvalidInput):
        Limits(**wrong)  # pyright: ignore


windows = st.lists(
    st.builds(
        lambda waited, read, predicted, useful: Totals(1.0, waited, read, predicted, min(useful, predicted)),
        st.floats(0, 1),
        st.integers(0, 100),
        st.integers(0, 100),
        st.integers(0, 100),
    ),
    max_size=60,
)


@given(windows, st.integers(0, 3), st.integers(1, 4))
def test_the_depth_keeps_its_limits_moves_by_one_and_is_determined(
    windows: list[Totals], depth: int, window: int
) -> None:
    limits = Limits(depth=depth, window=window)
    found = depths(Governor(limits), windows)
    assert found == depths(Governor(limits), windows)
    assert all(0 <= each <= depth for each in found)
    assert all(abs(later - sooner) <= 1 for sooner, later in zip([0, *found], found, strict=False))


@given(st.integers(1, 400), st.integers(1, 64))
def test_what_never_pays_takes_a_bounded_share_of_the_time(count: int, longest: int) -> None:
    governor = Governor(Limits(window=1, longest_pause=longest))
    found = depths(governor, [HALF_WAITED] * count)
    assert sum(found) <= count / (longest + 1) + longest.bit_length() + 1


@given(windows, windows)
def test_totals_add_up(some: list[Totals], more: list[Totals]) -> None:
    one, other = Totals(), Totals()
    for each in some:
        one = one.plus(each)
    for each in more:
        other = other.plus(each)
    assert one.plus(other).since(one) == pytest.approx(other)
