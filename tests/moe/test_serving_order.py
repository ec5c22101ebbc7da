"""The order in which layers are served: which copy, and which wave."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undercroft.moe.importance import Importance, weigh_token
from undercroft.moe.policies import make_policy
from undercroft.moe.quality import Quality
from undercroft.moe.serving_order import Choice, ServingOrder, waves
from undercroft.moe.stock import Stock
from undercroft.store.record import Key

HIGH, LOW, SKIP = Importance.HIGH, Importance.LOW, Importance.SKIP
STOCK = Stock.of([16384] * 2, experts=4, used=4, low="int4", low_nbytes=[4096] * 2)
LOSSLESS = Stock.of([16384] * 2, experts=4, used=4)
USES = weigh_token([0, 1, 2, 3], [0.5, 0.3, 0.15, 0.05])  # scores 0, .5, .8, .95


def choose(quality: Quality, here: set[Key], stock: Stock = STOCK) -> list[Choice]:
    order = ServingOrder(stock, quality, make_policy("lru", stock))
    return order.step(0, USES, 1, here.__contains__)


def test_exact_serves_high_copies_whatever_is_there() -> None:
    choices = choose(Quality.preset("exact"), set(), LOSSLESS)
    assert [choice.key for choice in choices] == list(LOSSLESS.high_keys[0])
    assert {choice.served for choice in choices} == {HIGH}


def test_thresholds_class_the_misses() -> None:
    choices = choose(Quality.preset("hobbit"), set())
    assert [choice.served for choice in choices] == [HIGH, HIGH, LOW, SKIP]
    assert [choice.key for choice in choices] == [*STOCK.high_keys[0][:2], STOCK.low_keys[0][2], None]


def test_a_high_copy_that_is_there_always_serves() -> None:
    choices = choose(Quality.preset("hobbit"), set(STOCK.high_keys[0]))
    assert {choice.served for choice in choices} == {HIGH}
    assert [choice.deserved for choice in choices] == [HIGH, HIGH, LOW, SKIP]


def test_a_low_copy_that_is_there_serves_what_deserves_no_more() -> None:
    choices = choose(Quality.preset("hobbit"), set(STOCK.low_keys[0]))
    assert [choice.key for choice in choices] == [*STOCK.high_keys[0][:2], *STOCK.low_keys[0][2:]]
    assert [choice.served for choice in choices] == [HIGH, HIGH, LOW, LOW]


def test_the_first_expert_of_a_token_is_never_degraded() -> None:
    order = ServingOrder(STOCK, Quality(low=1.0, skip=1.0), make_policy("lru", STOCK))
    steps = [order.step(0, USES, 1, set[Key]().__contains__) for _ in range(1000)]
    assert {choices[0].served for choices in steps} == {HIGH}
    assert {choice.served for choice in steps[-1][1:]} == {SKIP}


def test_a_low_copy_that_is_there_is_cheaper_than_one_to_read() -> None:
    order = ServingOrder(STOCK, Quality(low=0.15), make_policy("lru", STOCK))
    uses = weigh_token([0, 1, 2, 3], [0.97, 0.01, 0.01, 0.01])
    nothing = order.step(0, uses, 1, set[Key]().__contains__)
    order = ServingOrder(STOCK, Quality(low=0.015), make_policy("lru", STOCK))
    one = order.step(0, uses, 1, {STOCK.low_keys[0][2]}.__contains__)
    assert [choice.served for choice in nothing] == [HIGH, LOW, LOW, LOW]
    assert [choice.served for choice in one] == [HIGH, HIGH, LOW, HIGH]


@pytest.mark.parametrize("name", ["balanced", "fast", "hobbit"])
@given(
    st.lists(
        st.tuples(
            st.lists(st.floats(0.01, 1), min_size=4, max_size=4), st.sets(st.sampled_from(list(STOCK.places)))
        ),
        max_size=30,
    )
)
def test_the_account_is_the_mass_of_the_choices(name: str, steps: list[tuple[list[float], set[Key]]]) -> None:
    order = ServingOrder(STOCK, Quality.preset(name), make_policy("expected-use", STOCK))
    spent = {HIGH: 0.0, LOW: 0.0, SKIP: 0.0}
    for number, (weights, here) in enumerate(steps):
        for choice in order.step(number % 2, weigh_token([0, 1, 2, 3], weights), 1, here.__contains__):
            spent[choice.served] += choice.mass
            assert choice.served >= choice.deserved
    account = order.account
    assert (account.mass, account.low_mass, account.skip_mass) == pytest.approx(
        (sum(spent.values()), spent[LOW], spent[SKIP])
    )


@given(st.lists(st.sampled_from(list(STOCK.places)), unique=True), st.integers(1, 100_000))
def test_waves_find_room_keep_the_order_and_are_as_few_as_that_allows(keys: list[Key], budget: int) -> None:
    runs = list(waves(keys, STOCK, budget))
    assert [key for run in runs for key in run] == keys
    for run in runs:
        assert len(run) == 1 or room(run) <= budget
    for run, after in pairwise(runs):
        assert room([*run, after[0]]) > budget


def room(keys: list[Key]) -> int:
    """Bytes in which keys find room whatever holes there are."""
    return 2 * len(keys) * max(map(STOCK.occupied, keys))
