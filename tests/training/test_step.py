import pytest

from undercroft.errors import InvalidInput
from undercroft.training.step import (
    END,
    PACK,
    RELEASE,
    UNPACK,
    Demand,
    SavedStorage,
    StepTrace,
    actions_by_event,
    least_budget,
)


def saved(nbytes: int, packed: int, *uses: tuple[int, int], released: int) -> SavedStorage:
    return SavedStorage(nbytes=nbytes, packed=packed, uses=uses, released=released)


def step(events: int, *storages: SavedStorage) -> StepTrace:
    return StepTrace(storages=storages, times=tuple(float(event) for event in range(events)))


@pytest.mark.parametrize(
    "life",
    [
        {"nbytes": -1, "packed": 0, "uses": (), "released": 1},
        {"nbytes": 1, "packed": 2, "uses": (), "released": 1},
        {"nbytes": 1, "packed": 2, "uses": ((1, 3),), "released": 3},
        {"nbytes": 1, "packed": 0, "uses": ((2, 1),), "released": 3},
        {"nbytes": 1, "packed": 0, "uses": ((3, 4), (1, 2)), "released": 4},
    ],
)
def test_a_life_that_cannot_be_is_refused(life):
    with pytest.raises(InvalidInput):
        SavedStorage(**life)


def test_a_trace_that_cannot_be_is_refused():
    with pytest.raises(InvalidInput, match="never fall"):
        StepTrace(storages=(), times=(1.0, 0.5))
    with pytest.raises(InvalidInput, match="outlives"):
        step(2, saved(1, 0, released=2))


def test_what_ends_at_an_event_comes_before_what_begins_there():
    actions = actions_by_event(step(3, saved(1, 0, (1, 2), released=2), saved(1, 2, released=2)))
    assert actions == [[(PACK, 0)], [(UNPACK, 0)], [(END, 0), (RELEASE, 0), (PACK, 1), (RELEASE, 1)]]


def test_a_use_that_outlives_the_release_keeps_the_bytes():
    actions = actions_by_event(step(4, saved(1, 0, (1, 3), released=2)))
    assert actions == [[(PACK, 0)], [(UNPACK, 0)], [], [(END, 0), (RELEASE, 0)]]


def test_demand_counts_what_is_in_use_and_what_is_asked():
    trace = step(
        6, saved(10, 0, (2, 5), (3, 5), released=5), saved(7, 1, released=1), saved(3, 4, released=5)
    )
    demand = Demand(trace)
    assert (demand.asked, demand.used) == ([10, 7, 10, 3], [0, 0, 0, 10])
    assert demand.idle == [[(1, 2)], [], []]


@pytest.mark.parametrize(
    ("storages", "least"),
    [
        ((), 0),
        ((saved(10, 0, (2, 3), released=3), saved(40, 1, released=3)), 40),  # the largest alone
        ((saved(10, 0, (2, 5), released=5), saved(20, 1, (3, 4), released=5)), 30),  # uses overlap
        ((saved(10, 0, (2, 3), released=5), saved(20, 1, (3, 4), released=5)), 20),  # uses meet
        ((saved(10, 0, (1, 4), (2, 5), released=5),), 10),  # one storage, two users
        (
            (saved(10, 0, (1, 4), released=5), saved(20, 2, (3, 3), released=5)),
            30,
        ),  # packed while another is used
        ((saved(10, 0, (3, 3), released=3), saved(20, 1, (3, 3), released=3)), 30),  # one moment needs both
    ],
)
def test_least_budget(storages, least):
    assert least_budget(step(6, *storages)) == least
