import math

import pytest

from undercroft.errors import InvalidInput
from undercroft.training.simulation import Outcome, Rates, live_curve, simulate
from undercroft.training.step import SavedStorage, StepTrace

DISK = Rates(read_bytes_per_second=10, write_bytes_per_second=5)


def saved(nbytes: int, packed: int, *uses: tuple[int, int], released: int) -> SavedStorage:
    return SavedStorage(nbytes=nbytes, packed=packed, uses=uses, released=released)


def outcome(
    stall_seconds: float, written: int, read: int, peak: int = 10, *, feasible: bool = True
) -> Outcome:
    return Outcome(
        feasible=feasible,
        peak=peak,
        stall_seconds=pytest.approx(stall_seconds, abs=1e-9),
        written=written,
        read=read,
    )


# Saved first, wanted last: storage 0 at second 0 and 4, storage 1 at second 1 and 2.
NESTED = StepTrace(
    storages=(saved(10, 0, (4, 5), released=5), saved(10, 1, (2, 3), released=3)),
    times=(0.0, 1.0, 2.0, 3.0, 4.0, 5.0),
)


def test_nothing_spilled_costs_nothing():
    assert simulate(NESTED, (), budget=20, rates=DISK) == outcome(0, 0, 0, peak=20)


def test_what_is_kept_must_fit():
    assert not simulate(NESTED, (), budget=19, rates=DISK).feasible
    assert not simulate(NESTED, {1}, budget=10, rates=DISK).feasible


def test_a_pack_waits_for_the_write_that_makes_room():
    # Written until 2, so the second pack waits from 1 to 2. Released at 4, read until 5, wanted at 5.
    assert simulate(NESTED, {0}, budget=10, rates=DISK) == outcome(1, 10, 10)


def test_latency_comes_on_top_of_each_operation():
    # The write ends at 2.5: a wait of 1.5. The read goes from 4.5 to 6, and is wanted at 5.5.
    slow = Rates(read_bytes_per_second=10, write_bytes_per_second=5, latency_seconds=0.5)
    assert simulate(NESTED, {0}, budget=10, rates=slow) == outcome(2, 10, 10)


def test_an_unpack_forwards_what_is_being_written():
    # As above, but storage 1, whose write began at 2, is unpacked at 3: no wait, and held to its release.
    assert simulate(NESTED, {0, 1}, budget=10, rates=DISK) == outcome(1, 20, 10)


def test_a_queued_write_that_is_cancelled_writes_nothing():
    # With room for both, storage 1 is unpacked at 2, when the write of storage 0 has just ended.
    assert simulate(NESTED, {0, 1}, budget=20, rates=DISK) == outcome(0, 10, 10, peak=20)


def test_a_release_cancels_a_write():
    trace = StepTrace(
        storages=(saved(10, 0, released=1), saved(10, 0, released=2), saved(20, 2, released=3)),
        times=(0.0, 1.0, 1.5, 3.0),
    )
    # The first is half written when it dies. The second begins then, and dies too: all the room is free at
    # once.
    assert simulate(trace, {0, 1}, budget=20, rates=DISK) == outcome(0, 20, 0, peak=20)


def test_a_prefetch_pauses_the_writes():
    trace = StepTrace(
        storages=(
            saved(10, 0, (3, 4), released=4),
            saved(5, 1, (2, 3), released=3),
            saved(15, 1, (4, 5), released=5),
        ),
        times=(0.0, 2.0, 2.5, 3.5, 10.0, 11.0),
    )
    # Storage 0 is written until 2. Of storage 2, 2.5 of 15 bytes are written when the first unpack, at 2.5,
    # lets the prefetch of storage 0 run, until 3.5: in time. Then the write goes on, until 6. Storage 2 is
    # prefetched until 7.5; the next unpacks wait for nothing.
    assert simulate(trace, {0, 2}, budget=40, rates=DISK) == outcome(0, 25, 25, peak=30)


def test_a_demand_read_comes_before_the_writes():
    trace = StepTrace(
        storages=(saved(10, 0, (2, 3), released=3), saved(50, 1, released=4)),
        times=(0.0, 2.0, 3.0, 4.0, 5.0),
    )
    # Nothing is prefetched before the first unpack, so all of the read is a stall, and no more than the
    # read.
    assert simulate(trace, {0, 1}, budget=100, rates=DISK) == outcome(1, 60, 10, peak=60)


def test_a_prefetch_waits_for_room_and_keeps_its_turn():
    trace = StepTrace(
        storages=(
            saved(5, 0, (6, 7), released=7),
            saved(10, 1, (4, 5), released=5),
            saved(10, 2, (3, 4), released=4),
        ),
        times=(0.0, 1.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0),
    )
    # At 4 there is room for storage 0, but storage 1 is wanted first, and has none until storage 2 is
    # released at 5. So it is read by its own unpack there: a stall of 1. Storage 0 follows from 6 to 6.5,
    # in time.
    assert simulate(trace, {0, 1}, budget=15, rates=DISK) == outcome(1, 15, 15, peak=15)
    assert live_curve(trace, {0, 1}, budget=15, rates=DISK) == (5, 10, 10, 10, 15, 15, 5, 5)


def test_the_clean_storage_wanted_last_makes_room():
    trace = StepTrace(
        storages=(
            saved(10, 0, (2, 3), (9, 10), released=10),
            saved(10, 1, (4, 5), (8, 9), released=9),
            saved(10, 6, released=7),
        ),
        times=(0.0, 0.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 13.0, 14.0),
    )
    # Storage 0 is read on demand (stall 1), storage 1 meanwhile prefetched, and both stay for their second
    # use. The pack of storage 2 drops storage 0. It is prefetched again as soon as a backward runs again.
    assert simulate(trace, {0, 1}, budget=20, rates=DISK) == outcome(1, 20, 30, peak=20)


def test_what_was_forwarded_is_written_after_all_when_nothing_else_makes_room():
    trace = StepTrace(
        storages=(saved(10, 0, (1, 2), (5, 6), released=6), saved(10, 3, released=4)),
        times=(0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0),
    )
    # Forwarded at 1, half written. The pack at 3 makes it write all again (stall 2), the unpack reads it
    # (stall 1).
    assert simulate(trace, {0}, budget=10, rates=DISK) == outcome(3, 20, 10)


def test_of_what_was_forwarded_the_one_wanted_last_is_written():
    trace = StepTrace(
        storages=(
            saved(10, 0, (2, 3), (7, 8), released=8),
            saved(10, 1, (2, 3), (9, 10), released=10),
            saved(10, 4, (5, 6), released=6),
        ),
        times=(0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 5.5, 7.0, 8.0, 9.0),
    )
    # Both are forwarded at 1. For the pack at 3 storage 1 is written after all: a stall of 2. When storage 2
    # is gone, at 5 + 2, it is read in a second; storage 0, wanted half a second later, never left.
    assert simulate(trace, {0, 1}, budget=20, rates=DISK) == outcome(2, 20, 10, peak=20)


def test_a_stall_delays_all_that_follows_but_gives_the_disk_time():
    trace = StepTrace(
        storages=(
            saved(10, 0, (3, 4), released=4),
            saved(10, 1, (4, 5), released=5),
            saved(5, 2, released=3),
        ),
        times=(0.0, 1.0, 2.0, 2.5, 5.0, 6.0),
    )
    # The demand read of storage 0, from 2.5 to 3.5, holds up the second write, which ends at 5 instead of
    # 4. Storage 1 is then read until 6. Its unpack was due at 5, and comes at 6 because of the stall: it
    # waits for nothing.
    assert simulate(trace, {0, 1}, budget=40, rates=DISK) == outcome(1, 20, 20, peak=20)


def test_the_curve_shows_each_event_to_the_next():
    assert live_curve(NESTED, {0}, budget=30, rates=DISK) == (10, 20, 20, 20, 10, 10)


def test_the_curve_of_an_infeasible_step_ends_where_it_fails():
    assert live_curve(NESTED, (), budget=19, rates=DISK) == (10, 10)


def test_an_empty_step():
    empty = StepTrace(storages=(), times=())
    assert simulate(empty, (), budget=0, rates=DISK) == outcome(0, 0, 0, peak=0)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.inf, math.nan])
def test_rates_must_be_rates(rate):
    with pytest.raises(InvalidInput):
        Rates(read_bytes_per_second=rate, write_bytes_per_second=1)
    with pytest.raises(InvalidInput):
        Rates(read_bytes_per_second=1, write_bytes_per_second=rate)


def test_latency_cannot_be_negative():
    with pytest.raises(InvalidInput):
        Rates(read_bytes_per_second=1, write_bytes_per_second=1, latency_seconds=-1)
