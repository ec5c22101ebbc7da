"""Expert policies: each against the plainest statement of its formula, and what all have in common."""

import json
from collections import defaultdict
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undercroft.errors import InvalidInput
from undercroft.moe.layered import ExpertPolicy, Wanted
from undercroft.moe.policies import ONLINE, Apex, Belady, Hobbit, Lfru, make_policy
from undercroft.moe.stock import Stock
from undercroft.store.record import Key

LAYERS, EXPERTS = 3, 4
STOCK = Stock.of([4096] * LAYERS, experts=EXPERTS, used=2)
MIXED = Stock.of([8192] * LAYERS, experts=EXPERTS, used=2, low="int4", low_nbytes=[4096] * LAYERS)

Forward = list[tuple[int, int]]
forwards = st.lists(
    st.lists(
        st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=3, unique=True), min_size=3, max_size=3
    ),
    max_size=8,
)
places = st.tuples(st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1))


def serve(policy: ExpertPolicy, stock: Stock, inside: set[Key], layer: int, experts: list[int]) -> None:
    """What a cache without limits does."""
    policy.turn_to(layer, [Wanted(expert) for expert in experts])
    for key in (stock.high_keys[layer][expert] for expert in experts):
        policy.touch(key)
        if key not in inside:
            policy.insert(key)
            inside.add(key)


def replay(policy: ExpertPolicy, served: list[list[list[int]]], leaving: set[tuple[int, int]]) -> set[Key]:
    """Serve forwards, with some experts leaving after each; the keys that are in at the end."""
    inside: set[Key] = set()
    for forward in served:
        for layer, experts in enumerate(forward):
            serve(policy, STOCK, inside, layer, experts)
        for layer, expert in leaving:
            if (key := STOCK.high_keys[layer][expert]) in inside:
                policy.remove(key)
                inside.remove(key)
    return inside


@pytest.mark.parametrize("name", ONLINE)
@given(served=forwards, leaving=st.sets(places))
def test_victims_are_all_that_is_in_each_once_and_the_same_again(
    name: str, served: list[list[list[int]]], leaving: set[tuple[int, int]]
) -> None:
    first, second = make_policy(name, STOCK), make_policy(name, STOCK)
    inside = replay(first, served, leaving)
    replay(second, served, leaving)
    order = list(first.victims())
    assert sorted(order) == sorted(inside)
    assert order == list(first.victims()) == list(second.victims())


class Records:
    """What the formulas of the papers count."""

    def __init__(self, served: list[list[list[int]]]) -> None:
        self.forwards = len(served)
        self.uses = defaultdict[Key, list[int]](list)
        for number, forward in enumerate(served, start=1):
            for layer, experts in enumerate(forward):
                for expert in experts:
                    self.uses[STOCK.high_keys[layer][expert]].append(number)


def hobbit(records: Records, key: Key, distance: int) -> float:
    uses = records.uses[key]
    return (uses[-1] + 2 * len(uses)) / records.forwards + 1 - distance / LAYERS


def apex(records: Records, key: Key, distance: int) -> float:
    uses = records.uses[key]
    return len(uses) / records.forwards + (uses[-1] == records.forwards) / (distance + 0.1)


def lfru(records: Records, key: Key, distance: int) -> float:
    uses = records.uses[key]
    return len(uses) / (records.forwards - uses[-1] + 1)


@pytest.mark.parametrize(("make", "priority"), [(Hobbit, hobbit), (Apex, apex), (Lfru, lfru)])
@given(served=forwards.filter(bool))
def test_policies_of_the_literature_follow_their_formulas(
    make: Callable[[Stock], ExpertPolicy],
    priority: Callable[[Records, Key, int], float],
    served: list[list[list[int]]],
) -> None:
    policy = make(STOCK)
    replay(policy, served, set())
    records = Records(served)
    values = [
        priority(records, key, (STOCK.places[key].layer - (LAYERS - 1)) % LAYERS) for key in policy.victims()
    ]
    assert values == pytest.approx(sorted(values))


def test_low_uses_count_as_much_as_they_cost() -> None:
    policies = Apex(MIXED), Hobbit(MIXED)
    for policy in policies:
        for key in MIXED.high_keys[0][:2]:
            policy.insert(key)
        for expert in (0, 0, 0, 1, 1):
            policy.turn_to(0, [Wanted(expert, 1, expert == 1)])
    assert next(policies[0].victims()).name == "layers.0.experts.0"  # three times a half, against two
    assert next(policies[1].victims()).name == "layers.0.experts.0"


def test_records_of_the_literature_are_those_of_one_sequence() -> None:
    for name in ("hobbit", "apex", "lfru"):
        used, fresh = make_policy(name, STOCK), make_policy(name, STOCK)
        inside = replay(used, [[[0], [1], [2]], [[0], [1], [3]]], set())
        used.begin()
        for key in sorted(inside):
            fresh.insert(key)
        assert list(used.victims()) == list(fresh.victims())


@given(forwards.filter(bool))
def test_belady_puts_the_latest_next_use_first(served: list[list[list[int]]]) -> None:
    future = [(layer, experts) for forward in served for layer, experts in enumerate(forward)]
    half = len(served) // 2 * LAYERS
    policy, inside = Belady(STOCK, future), set[Key]()
    for layer, experts in future[:half]:
        serve(policy, STOCK, inside, layer, experts)
    coming = {key: len(future) for key in inside}
    for number, (layer, experts) in reversed(list(enumerate(future[half:]))):
        coming |= {STOCK.high_keys[layer][expert]: number for expert in experts}
    order = [coming[key] for key in policy.victims()]
    assert order == sorted(order, reverse=True)


@pytest.mark.parametrize("name", ONLINE)
def test_what_was_learned_survives_as_json(name: str) -> None:
    served = [[[0, 1], [2], [3]], [[0], [2], [1]], [[0, 3], [2], [1]]]
    first, second = make_policy(name, STOCK), make_policy(name, STOCK)
    replay(first, served, set())
    second.restore(json.loads(json.dumps(first.state())))
    assert second.state() == first.state()


@pytest.mark.parametrize("name", ["belady", "best", ""])
def test_a_policy_that_is_not_there(name: str) -> None:
    with pytest.raises(InvalidInput, match="is no policy; there are expected-use, lru"):
        make_policy(name, STOCK)
