"""How important each expert is to the tokens that are routed to it.

Pure: gate weights in, scores and classes out. It does not know what is in memory, nor what a lower precision
costs. The scores are HOBBIT's (arXiv 2411.01433, section 3.2; "cumulative score" in MoE-APEX): with the
normalised gate weights of a token in falling order, the score of an expert is the weight of all those above
it. Invariant: the first expert of any token has the score 0, and is HIGH under every threshold.
"""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from undercroft.errors import InvalidInput


class Importance(enum.IntEnum):
    """What an expert deserves; a larger one is more important."""

    SKIP = 0
    LOW = 1
    HIGH = 2


class Use(NamedTuple):
    """What the tokens of one forward want of one expert.

    Attributes:
        expert: which.
        mass: the sum of its normalised gate weights; over all experts it is the number of tokens.
        score: the least of its scores over these tokens, 0 to 1; the lower, the more important.
        tokens: how many are routed to it.
    """

    expert: int
    mass: float
    score: float
    tokens: int


def classify(score: float, thresholds: tuple[float, float]) -> Importance:
    """HIGH up to the first threshold, LOW up to the second, SKIP above."""
    if score <= thresholds[0]:
        return Importance.HIGH
    return Importance.LOW if score <= thresholds[1] else Importance.SKIP


def weigh_token(experts: Sequence[int], weights: Sequence[float]) -> list[Use]:
    """What one token wants: the fast way for decoding.

    Args:
        experts: K different experts.
        weights: their K gate weights, finite and not negative; they need not sum to 1.

    Returns:
        One use an expert, in ascending order of experts.

    Raises:
        InvalidInput: weights that cannot be a router's.
    """
    total = math.fsum(weights)
    if not (math.isfinite(total) and min(weights) >= 0 and len(weights) == len(experts)):
        raise _no_weights()
    masses = [weight / total for weight in weights] if total else [1 / len(weights)] * len(weights)
    falling = sorted(range(len(masses)), key=lambda slot: -masses[slot])
    above = itertools.accumulate((masses[slot] for slot in falling), initial=0.0)
    return sorted(
        Use(experts[slot], masses[slot], score, 1) for slot, score in zip(falling, above, strict=False)
    )


def weigh(experts: NDArray[Any], weights: NDArray[Any]) -> list[Use]:
    """What the tokens of a forward want; the most important use of an expert gives it its score.

    Args:
        experts: integers, (tokens, K), different within a token.
        weights: their gate weights, (tokens, K), finite and not negative; rows need not sum to 1.

    Returns:
        One use an expert that is used, in ascending order of experts.

    Raises:
        InvalidInput: weights that cannot be a router's.
    """
    if experts.shape != weights.shape or not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise _no_weights()
    if len(experts) == 1:
        return weigh_token(experts[0].tolist(), weights[0].tolist())
    masses = _normalised(weights.astype(np.float64))
    falling = np.argsort(-masses, axis=1, kind="stable")
    ordered = np.take_along_axis(masses, falling, axis=1)
    scores = np.empty_like(masses)
    np.put_along_axis(scores, falling, np.cumsum(ordered, axis=1) - ordered, axis=1)
    return _gather(experts.ravel(), masses.ravel(), scores.ravel())


def _normalised(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    totals = weights.sum(axis=1, keepdims=True)
    return np.where(totals > 0, weights / np.where(totals > 0, totals, 1), 1 / weights.shape[1])


def _gather(experts: NDArray[Any], masses: NDArray[np.float64], scores: NDArray[np.float64]) -> list[Use]:
    present, places = np.unique(experts, return_inverse=True)
    least = np.full(len(present), np.inf)
    np.minimum.at(least, places, np.maximum(scores, 0.0))
    columns = (present, np.bincount(places, masses), least, np.bincount(places))
    return [Use(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def _no_weights() -> InvalidInput:
    return InvalidInput("gate weights must be finite, not negative, and as many as there are experts")
