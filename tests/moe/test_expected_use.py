"""Expected use: what it believes, what it evicts, and what it need not be told."""

import json

import numpy as np
import pytest

from undercroft.errors import InvalidInput
from undercroft.moe.expected_use import ExpectedUse
from undercroft.moe.layered import Wanted
from undercroft.moe.stock import Stock

STOCK = Stock.of([4096] * 4, experts=8, used=2)
MIXED = Stock.of([8192] * 4, experts=8, used=2, low="int4", low_nbytes=[4096] * 4)


def trained(stock: Stock, tokens: int, seed: int = 0) -> ExpectedUse:
    """Layer 0 always wants experts 0 and 1; the others want any two."""
    policy, random = ExpectedUse(stock), np.random.default_rng(seed)
    for _ in range(tokens):
        for layer in range(stock.layers):
            experts = [0, 1] if layer == 0 else random.permutation(stock.experts)[:2].tolist()
            policy.turn_to(layer, [Wanted(expert) for expert in experts])
    return policy


def test_chances_approach_what_happens_and_sum_to_what_a_token_uses() -> None:
    policy = trained(STOCK, 200)
    assert policy.chance(0, 0) > 0.9
    assert policy.chance(0, 5) < 0.02
    for layer in range(4):
        assert sum(policy.chance(layer, expert) for expert in range(8)) == pytest.approx(2)


def test_where_routing_is_chance_little_is_believed() -> None:
    stock = Stock.of([4096] * 4, experts=64, used=4)
    policy, random = ExpectedUse(stock), np.random.default_rng(0)
    for _ in range(200):
        for layer in range(4):
            policy.turn_to(layer, [Wanted(expert) for expert in random.permutation(64)[:4].tolist()])
    chances = [policy.chance(layer, expert) for layer in range(4) for expert in range(64)]
    assert max(chances) < 3 * 4 / 64


def test_the_rule_is_the_expected_time_to_the_next_use() -> None:
    policy = trained(STOCK, 50)
    for layer in range(4):
        for expert in range(8):
            policy.insert(STOCK.high_keys[layer][expert])
    policy.turn_to(1)

    def gap(layer: int, expert: int) -> float:
        chance = policy.chance(layer, expert)
        return (layer - 2) % 4 + 4 * (1 - chance) / chance

    gaps = [gap(*STOCK.places[key][:2]) for key in policy.victims()]
    assert gaps == pytest.approx(sorted(gaps, reverse=True))


def test_among_equals_the_layer_served_last_leaves_first() -> None:
    policy = ExpectedUse(STOCK)
    for layer in range(4):
        policy.insert(STOCK.high_keys[layer][0])
    policy.turn_to(2)
    assert [STOCK.places[key].layer for key in policy.victims()] == [2, 1, 0, 3]


def test_a_prefill_counts_by_the_share_of_its_tokens() -> None:
    policy = trained(STOCK, 50)
    prompt = [Wanted(0, 90), Wanted(1, 90), *(Wanted(expert, 3) for expert in range(2, 8))]
    before = policy.chance(0, 0)
    policy.turn_to(0, prompt, tokens=100)
    assert policy.chance(0, 0) == pytest.approx(before, abs=0.1)
    assert policy.chance(0, 7) < 0.1


def test_a_low_copy_beside_the_high_one_leaves_first() -> None:
    policy = ExpectedUse(MIXED)
    low, high = MIXED.low_keys[0][0], MIXED.high_keys[0][0]
    for key in (low, MIXED.high_keys[0][1], MIXED.low_keys[0][1], MIXED.low_keys[0][2]):
        policy.insert(key)
    assert next(policy.victims()) == MIXED.low_keys[0][1]
    policy.insert(high)
    assert set(list(policy.victims())[:2]) == {low, MIXED.low_keys[0][1]}
    policy.remove(high)
    assert next(policy.victims()) == MIXED.low_keys[0][1]
    assert list(policy.victims())[1] != low or policy.chance(0, 0) == policy.chance(0, 2)


def test_a_copy_is_worth_the_bytes_that_it_saves() -> None:
    policy = ExpectedUse(MIXED)
    for _ in range(100):
        policy.turn_to(0, [Wanted(0, 1, is_high=True), Wanted(1, 1, is_high=False)])
    rows = (MIXED.high_keys[0][:2], MIXED.low_keys[0][2:3])
    for key in (key for row in rows for key in row):
        policy.insert(key)
    order = list(policy.victims())
    assert order == [MIXED.low_keys[0][2], MIXED.high_keys[0][1], MIXED.high_keys[0][0]]


def test_statistics_survive() -> None:
    first, second = trained(MIXED, 20), ExpectedUse(MIXED)
    second.restore(json.loads(json.dumps(first.state())))
    for layer in range(4):
        for expert in range(8):
            assert second.chance(layer, expert) == pytest.approx(first.chance(layer, expert), abs=0.01)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"views": [[1.0]]},
        {"weights": [float("nan")] * 4},
        {"seen": [-1] * 4},
        {"seen": "x"},
        {"low_shares": [[2.0] * 8] * 4},
    ],
)
def test_statistics_that_are_none(wrong: dict[str, object]) -> None:
    state = trained(STOCK, 1).state() | wrong if wrong else {}
    with pytest.raises(InvalidInput, match="saved statistics"):
        ExpectedUse(STOCK).restore(state)
    other = Stock.of([4096] * 5, experts=8, used=2)
    with pytest.raises(InvalidInput, match="saved statistics"):
        ExpectedUse(other).restore(trained(STOCK, 1).state())


def test_lessons_that_nobody_asked_for_are_let_go_once_no_view_would_remember_them() -> None:
    stock = Stock.of([100, 100], experts=8, used=2, high="high")
    policies = ExpectedUse(stock), ExpectedUse(stock)
    for token in range(700):
        for layer in (0, 1):
            policies[0].turn_to(layer, [Wanted((token + layer) % 8), Wanted((token + 3) % 8)])
    for token in range(700 - 256, 700):
        for layer in (0, 1):
            policies[1].turn_to(layer, [Wanted((token + layer) % 8), Wanted((token + 3) % 8)])
    assert policies[0].state() == policies[1].state()
