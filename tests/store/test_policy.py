"""Eviction policies: pure orders, each against the plainest statement of what it is."""

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undercroft.store.policy import EvictionPolicy, Lfu, Lru

KINDS = [Lru, Lfu]
Step = tuple[str, int]


def replay(policy: EvictionPolicy[int], steps: list[Step]) -> tuple[set[int], list[Step]]:
    """Play those steps that make sense; the keys that are in at the end, and the steps that were played."""
    inside: set[int] = set()
    played: list[Step] = []
    for verb, key in steps:
        if (verb == "insert" and key in inside) or (verb == "remove" and key not in inside):
            continue
        getattr(policy, verb)(key)
        played.append((verb, key))
        if verb != "touch":
            (inside.add if verb == "insert" else inside.remove)(key)
    return inside, played


steps = st.lists(st.tuples(st.sampled_from(["touch", "touch", "insert", "remove"]), st.integers(0, 6)))


def recency(played: list[Step], key: int) -> int:
    """When a key that is in was last touched or inserted."""
    return max(n for n, (verb, each) in enumerate(played) if each == key and verb != "remove")


@given(steps)
def test_lru_puts_the_longest_unused_first(steps: list[Step]) -> None:
    policy: Lru[int] = Lru()
    inside, played = replay(policy, steps)
    assert list(policy.victims()) == sorted(inside, key=lambda key: recency(played, key))


@given(steps)
def test_lfu_puts_the_least_touched_first(steps: list[Step]) -> None:
    policy: Lfu[int] = Lfu()
    inside, played = replay(policy, steps)
    touches = Counter(key for verb, key in played if verb == "touch")
    order = sorted(inside, key=lambda key: (touches[key], recency(played, key)))
    assert list(policy.victims()) == order


@pytest.mark.parametrize("make", KINDS)
@given(steps=steps)
def test_equal_calls_give_equal_orders(make: Callable[[], EvictionPolicy[int]], steps: list[Step]) -> None:
    first, second = make(), make()
    inside, _ = replay(first, steps)
    replay(second, steps)
    assert list(first.victims()) == list(second.victims())
    assert sorted(first.victims()) == sorted(inside)


@pytest.mark.parametrize("make", KINDS)
def test_reading_the_victims_changes_nothing(make: Callable[[], EvictionPolicy[int]]) -> None:
    policy = make()
    for key in range(3):
        policy.insert(key)
    assert list(policy.victims()) == list(policy.victims()) == [0, 1, 2]
    next(policy.victims())
    policy.touch(0)
    assert list(policy.victims()) == [1, 2, 0]


def test_lfu_remembers_touches_of_a_key_that_left() -> None:
    policy: Lfu[str] = Lfu()
    for key in "ab":
        policy.insert(key)
    for key in "aaab":
        policy.touch(key)
    policy.remove("a")
    policy.insert("a")
    assert list(policy.victims()) == ["b", "a"]


def test_keys_may_be_anything_that_hashes() -> None:
    policy: Lru[tuple[str, str]] = Lru()
    policy.insert(("layers.0", "int4"))
    policy.insert(("layers.0", "int8"))
    policy.touch(("layers.0", "int4"))
    assert list(policy.victims()) == [("layers.0", "int8"), ("layers.0", "int4")]
