"""Dividing experts between a link and the CPU: never later than any other division, and so than either way alone."""

from itertools import chain, combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undercroft.moe.cooperate import Costs, Division, Estimates, divide, finish

seconds = st.integers(0, 50).map(float)
costs = st.builds(Costs, move=seconds, compute=seconds, round_trip=seconds, dispatch=seconds)
sizes = st.lists(st.sampled_from([3, 7]), max_size=8)


def ends(division: Division, sizes: list[int], costs: Costs, busy: float) -> float:
    moved, computed = (sum(sizes[place] for place in places) for places in division[:2])
    return finish(moved, len(division.moved), computed, costs, busy)


def everything(count: int) -> list[Division]:
    places = range(count)
    chosen = chain.from_iterable(combinations(places, number) for number in range(count + 1))
    return [Division(each, tuple(sorted({*places} - {*each}))) for each in chosen]


@given(sizes, costs, seconds)
def test_no_division_ends_sooner(sizes: list[int], costs: Costs, busy: float) -> None:
    found = divide(sizes, costs, busy)
    assert sorted(found.moved + found.computed) == [*range(len(sizes))]
    assert ends(found, sizes, costs, busy) == min(
        ends(each, sizes, costs, busy) for each in everything(len(sizes))
    )


@given(sizes, costs, seconds)
def test_it_is_never_slower_than_the_better_of_the_two(sizes: list[int], costs: Costs, busy: float) -> None:
    count = len(sizes)
    alone = [Division(tuple(range(count))), Division((), tuple(range(count)))]
    found = ends(divide(sizes, costs, busy), sizes, costs, busy)
    assert found <= min(ends(each, sizes, costs, busy) for each in alone)


@given(sizes, costs, seconds)
def test_the_link_is_kept_busy_and_at_most_one_expert_behind(
    sizes: list[int], costs: Costs, busy: float
) -> None:
    found = divide(sizes, costs, busy)
    assert found.kept == found.computed[: len(found.kept)]
    cpu = len(found.moved) * costs.dispatch
    if found.computed:
        cpu += costs.round_trip + sum(sizes[place] for place in found.computed) * costs.compute
    link = [busy + sum(sizes[place] for place in found.moved) * costs.move]
    for place in found.kept:
        link.append(link[-1] + sizes[place] * costs.move)
    assert all(each < cpu for each in link[:-1]) or not found.kept
    assert link[-1] >= cpu or found.kept == found.computed


@pytest.mark.parametrize(
    ("costs", "moved", "computed"),
    [
        (Costs(move=1, compute=100), (0, 1, 2, 3), ()),
        (Costs(move=100, compute=1), (), (0, 1, 2, 3)),
        (Costs(move=1, compute=1), (0, 1), (2, 3)),
        (Costs(move=1, compute=3), (0, 1, 2), (3,)),
        (Costs(move=1, compute=1, round_trip=1000), (0, 1, 2, 3), ()),
        (Costs(move=1, compute=1, dispatch=1000), (), (0, 1, 2, 3)),
    ],
)
def test_examples(costs: Costs, moved: tuple[int, ...], computed: tuple[int, ...]) -> None:
    assert divide([10] * 4, costs)[:2] == (moved, computed)


def test_a_queue_before_the_link_leaves_more_to_the_cpu() -> None:
    costs = Costs(move=1, compute=1)
    assert [len(divide([10] * 4, costs, busy).computed) for busy in (0, 10, 20, 30, 40)] == [2, 2, 3, 3, 4]


def test_what_the_cpu_computes_comes_to_the_device_all_the_same() -> None:
    """Else a CPU that is a little faster than the link would compute the same expert for ever."""
    assert divide([10], Costs(move=1.1, compute=1)) == ((), (0,), (0,))


def test_both_ways_are_found_out_first() -> None:
    estimates = Estimates()
    assert estimates.divide([8, 8], 0) == ((0, 1), (), ())
    estimates.note_move(8, 2.0)
    assert estimates.costs is None
    assert estimates.divide([8, 8], 0) == ((1,), (0,), (0,))
    estimates.note_compute(8, 4.0, 0.5)
    estimates.note_dispatch(2, 1.0)
    assert estimates.costs == Costs(move=0.25, compute=0.5, round_trip=0.5, dispatch=0.5)
    assert estimates.divide([], 0) == ((), (), ())


def test_estimates_follow_what_is_measured() -> None:
    estimates = Estimates()
    for _ in range(30):
        estimates.note_move(1, 1.0)
        estimates.note_compute(1, 5.0, 0.0)
    for _ in range(30):
        estimates.note_move(1, 4.0)
    costs = estimates.costs
    assert costs is not None
    assert costs.move == pytest.approx(4, rel=0.01)
    assert costs.compute == 5


def test_a_cpu_that_was_slow_once_is_tried_again() -> None:
    estimates = Estimates()
    estimates.note_move(1, 1.0)
    estimates.note_compute(1, 100.0, 0.0)
    steps = next(step for step in range(20_000) if estimates.divide([1] * 4, 0).computed)
    assert 1000 < steps < 10_000
