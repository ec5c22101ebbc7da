"""Budgets: never exceeded, every byte returned once, from any thread and any destructor."""

import gc
import sys
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from undercroft.errors import BudgetExceeded, InvalidInput
from undercroft.store.budget import Budget, Reservation

LIMIT = 1000


def test_sizes_may_be_written_as_text() -> None:
    assert Budget(host="8GiB").limit("host") == 8 * 2**30


def test_a_tier_without_a_limit_is_counted_all_the_same() -> None:
    budget = Budget(host=1)
    reservation = budget.reserve("disk", 2**50, "spill")
    assert budget.limit("disk") is None
    assert budget.held("disk") == 2**50
    reservation.release()
    assert budget.held("disk") == 0


def test_tiers_do_not_share_room() -> None:
    budget = Budget(host=LIMIT, device=LIMIT)
    with budget.reserve("host", LIMIT, "slab"):
        assert budget.can_reserve("device", LIMIT)
        assert not budget.can_reserve("host", 1)


@pytest.mark.parametrize("limits", [{"ram": 1}, {"host": "much"}, {"host": -1}])
def test_what_is_no_tier_or_no_size_is_refused(limits: dict[str, int | str]) -> None:
    with pytest.raises(InvalidInput):
        Budget(**limits)


def test_a_refusal_says_who_holds_what_and_changes_nothing() -> None:
    budget = Budget(host=LIMIT)
    kept = [budget.reserve("host", 300, "cache"), budget.reserve("host", 400, "slab")]
    with pytest.raises(BudgetExceeded, match="slab 400 B, cache 300 B") as caught:
        budget.reserve("host", 301, "loader")
    assert (caught.value.asked, caught.value.budget, caught.value.tier) == (301, LIMIT, "host")
    assert caught.value.held == budget.holders("host") == {"cache": 300, "slab": 400}
    assert budget.held("host") == 700
    kept.append(budget.reserve("host", 300, "loader"))


def test_a_reservation_returns_its_bytes_once() -> None:
    budget = Budget(host=LIMIT)
    other = budget.reserve("host", 10, "other")
    with budget.reserve("host", 500, "slab") as reservation:
        reservation.release()
        reservation.release()
        assert budget.held("host") == 10
    del reservation
    gc.collect()
    assert budget.holders("host") == {"other": 10}
    other.release()


def test_a_reservation_that_is_dropped_returns_its_bytes() -> None:
    budget = Budget(host=LIMIT)
    reservation = budget.reserve("host", LIMIT, "slab")
    del reservation
    assert budget.try_reserve("host", LIMIT, "next") is not None


def test_the_peak_is_the_most_held_at_once_since_it_was_forgotten() -> None:
    budget = Budget(host=LIMIT)
    with budget.reserve("host", 600, "a"):
        budget.reserve("host", 100, "b").release()
    assert budget.peak("host") == 700
    with budget.reserve("host", 200, "a"):
        budget.forget_peak()
        assert budget.peak("host") == 200


class Books(RuleBasedStateMachine):
    """A budget against plain arithmetic."""

    @initialize(limit=st.integers(0, 100))
    def begin(self, limit: int) -> None:
        self.limit = limit
        self.budget = Budget(host=limit)
        self.live: list[Reservation] = []
        self.peak = 0

    @rule(nbytes=st.integers(0, 60), holder=st.sampled_from("abc"))
    def reserve(self, nbytes: int, holder: str) -> None:
        fits = self.held() + nbytes <= self.limit
        assert self.budget.can_reserve("host", nbytes) is fits
        reservation = self.budget.try_reserve("host", nbytes, holder)
        assert (reservation is not None) is fits
        if reservation is not None:
            self.live.append(reservation)
            self.peak = max(self.peak, self.held())

    @precondition(lambda self: self.live)
    @rule(data=st.data(), by_death=st.booleans())
    def give_back(self, data: st.DataObject, by_death: bool) -> None:
        reservation = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        if not by_death:
            reservation.release()

    @invariant()
    def the_books_agree(self) -> None:
        assert self.budget.held("host") == sum(self.budget.holders("host").values()) == self.held()
        assert self.budget.peak("host") == self.peak <= self.limit

    def held(self) -> int:
        return sum(reservation.nbytes for reservation in self.live)


TestBooks = Books.TestCase


@pytest.fixture
def eager_switching() -> Iterator[None]:
    """Threads take turns far more often than they otherwise would."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("eager_switching")
def test_threads_never_hold_more_than_the_limit() -> None:
    budget = Budget(host=10)
    lock = threading.Lock()
    held, most = 0, 0

    def take_turns() -> None:
        nonlocal held, most
        for _ in range(300):
            reservation = budget.try_reserve("host", 3, threading.current_thread().name)
            if reservation is None:
                continue
            with lock:
                held += 3
                most = max(most, held)
            with lock:
                held -= 3
            reservation.release()

    threads = [threading.Thread(target=take_turns) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 < most <= 9
    assert budget.peak("host") <= 10
    assert budget.held("host") == 0


class Cycle:
    """A reservation that only the garbage collector can free."""

    def __init__(self, reservation: Reservation) -> None:
        self.reservation = reservation
        self.me = self


def test_the_garbage_collector_may_release_in_the_middle_of_any_call() -> None:
    budget = Budget(host=LIMIT)
    before = gc.get_threshold()
    gc.set_threshold(1)  # a collection at nearly every allocation, those inside the budget's lock among them
    try:
        for _ in range(500):
            reservation = budget.try_reserve("host", 1, "cycle")
            assert reservation is not None
            Cycle(reservation)
            budget.holders("host")
    finally:
        gc.set_threshold(*before)
    del reservation
    gc.collect()
    assert budget.held("host") == 0


@given(st.lists(st.integers(0, 2**62), max_size=5))
def test_sums_beyond_the_machine_word_are_exact(sizes: list[int]) -> None:
    budget = Budget()
    live = [budget.reserve("disk", nbytes, "many") for nbytes in sizes]
    assert budget.held("disk") == sum(sizes)
    del live
    assert budget.held("disk") == 0
