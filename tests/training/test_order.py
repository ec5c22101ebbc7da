"""When a saved storage is wanted next: learned from the last step, or guessed."""

import math
from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from undercroft.training.order import Order

FORWARD_AND_BACK = [0, 1, 2, ~2, ~1, ~0]


def advanced(order: Order, calls: list[int]) -> Order:
    for call in calls:
        order.advance(call)
    return order


def test_without_a_learned_step_the_last_saved_is_wanted_first() -> None:
    order = Order()
    assert not order.holds
    assert order.next_use(2) < order.next_use(1) < order.next_use(0) < math.inf
    assert list(order.upcoming(last_unpacked=3)) == [2, 1, 0]


def test_a_learned_step_says_when() -> None:
    order = Order(FORWARD_AND_BACK)
    assert [order.next_use(number) for number in (0, 1, 2)] == [5, 4, 3]
    assert list(order.upcoming(0)) == [2, 1, 0]
    advanced(order, [0, 1, 2, ~2])
    assert order.next_use(2) == math.inf, "its only use is over"
    assert order.next_use(1) == 4
    assert list(order.upcoming(2)) == [1, 0]


def test_several_uses_of_one_storage() -> None:
    order = advanced(Order([0, 1, ~0, ~1, ~0]), [0, 1, ~0])
    assert order.next_use(0) == 4
    assert list(order.upcoming(0)) == [1, 0]


def test_a_storage_never_seen_is_never_wanted() -> None:
    assert Order(FORWARD_AND_BACK).next_use(99) == math.inf


def test_another_call_than_the_learned_one_ends_the_belief() -> None:
    order = advanced(Order(FORWARD_AND_BACK), [0, 1, ~1])
    assert not order.holds
    assert order.next_use(1) == -1
    advanced(order, [2])
    assert not order.holds, "until the next step"
    order.restart()
    assert order.holds
    assert order.next_use(0) == 5


def test_a_longer_step_is_another_step() -> None:
    order = advanced(Order([0, ~0]), [0, ~0])
    assert order.holds
    order.advance(1)
    assert not order.holds


def test_the_turn_from_forward_to_backward() -> None:
    order = Order(FORWARD_AND_BACK)
    turns = [order.turns]
    for call in FORWARD_AND_BACK:
        order.advance(call)
        turns.append(order.turns)
    assert turns == [False, False, False, True, False, False, False]


@given(st.lists(st.integers(0, 9), max_size=40), st.integers(0, 80))
def test_upcoming_is_in_the_order_of_next_use(numbers: list[int], position: int) -> None:
    packs = list(dict.fromkeys(numbers))
    calls = packs + [~number for number in reversed(numbers)]
    order = advanced(Order(calls), calls[:position])
    upcoming = list(dict.fromkeys(order.upcoming(0)))
    uses = [order.next_use(number) for number in upcoming]
    if order.holds:
        assert uses == sorted(uses)
        assert math.inf not in uses
        gone = set(packs) - set(upcoming)
        assert all(order.next_use(number) == math.inf for number in gone)


def test_upcoming_is_lazy() -> None:
    assert list(islice(Order().upcoming(10**9), 2)) == [10**9 - 1, 10**9 - 2]
