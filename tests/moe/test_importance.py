"""Scores of experts: HOBBIT's formula, for one token and for many."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from undercroft.errors import InvalidInput
from undercroft.moe.importance import Importance, classify, weigh, weigh_token

gates = st.lists(st.floats(0, 1e6), min_size=1, max_size=10)


def test_a_score_is_the_weight_of_all_above() -> None:
    uses = weigh_token([7, 3, 5], [1.0, 6.0, 3.0])
    assert [use.expert for use in uses] == [3, 5, 7]
    assert [use.mass for use in uses] == pytest.approx([0.6, 0.3, 0.1])
    assert [use.score for use in uses] == pytest.approx([0.0, 0.6, 0.9])


@pytest.mark.parametrize(
    ("score", "expected"),
    [(0.0, Importance.HIGH), (0.6, Importance.HIGH), (0.61, Importance.LOW), (0.91, Importance.SKIP)],
)
def test_classes_at_the_thresholds(score: float, expected: Importance) -> None:
    assert classify(score, (0.6, 0.9)) is expected


@given(gates)
def test_the_first_expert_of_a_token_is_high_under_every_threshold(weights: list[float]) -> None:
    uses = weigh_token(range(len(weights)), weights)
    classes = {use.expert: classify(use.score, (0.0, 0.0)) for use in uses}
    assert classes[weights.index(max(weights))] is Importance.HIGH
    assert math.isclose(sum(use.mass for use in uses), 1)


@given(gates)
def test_many_tokens_alike_are_weighed_as_one(weights: list[float]) -> None:
    one = weigh_token(range(len(weights)), weights)
    many = weigh(np.tile(np.arange(len(weights)), (3, 1)), np.tile(np.array(weights), (3, 1)))
    assert [use.expert for use in many] == [use.expert for use in one]
    assert [use.mass for use in many] == pytest.approx([3 * use.mass for use in one])
    assert [use.score for use in many] == pytest.approx([use.score for use in one], abs=1e-9)
    assert {use.tokens for use in many} == {3}


def test_the_most_important_use_of_an_expert_counts() -> None:
    uses = weigh(np.array([[0, 1], [2, 0], [0, 2]]), np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4]]))
    assert [(use.expert, use.tokens) for use in uses] == [(0, 3), (1, 1), (2, 2)]
    assert [use.score for use in uses] == pytest.approx([0.0, 0.9, 0.0])
    assert [use.mass for use in uses] == pytest.approx([1.6, 0.1, 1.3])


def test_a_token_without_weight_wants_all_its_experts_alike() -> None:
    assert [use.mass for use in weigh_token([1, 2], [0.0, 0.0])] == [0.5, 0.5]
    assert [use.mass for use in weigh(np.array([[1, 2], [1, 2]]), np.zeros((2, 2)))] == [1.0, 1.0]


@pytest.mark.parametrize("weights", [[math.nan, 1.0], [-0.1, 1.0], [math.inf, 1.0], [1.0]])
def test_weights_that_are_none(weights: list[float]) -> None:
    with pytest.raises(InvalidInput, match="gate weights"):
        weigh_token([0, 1], weights)
    with pytest.raises(InvalidInput, match="gate weights"):
        weigh(np.array([[0, 1], [0, 1]]), np.array([weights, weights]))
