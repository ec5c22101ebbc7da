"""Synthetic traces have the order that was asked for, and no other."""

import numpy as np
import pytest

from undercroft.moe.synthetic import synthetic_trace
from undercroft.moe.trace import Trace


def repeats(trace: Trace) -> float:
    """The share of a decoded token's experts that the token before it used too."""
    steps = [step for step in trace.steps() if not step.is_prefill]
    pairs = zip(steps, steps[trace.layers :], strict=False)
    return float(np.mean([len(set(a.experts[0]) & set(b.experts[0])) / trace.used for a, b in pairs]))


def popularity(trace: Trace) -> float:
    """The share of uses that the most popular quarter of each layer's experts have."""
    counts = np.zeros((trace.layers, trace.experts))
    np.add.at(counts, (np.repeat(trace.layer, trace.used), trace.expert.ravel()), 1)
    counts.sort(axis=1)
    return float(counts[:, -trace.experts // 4 :].sum() / counts.sum())


def test_the_same_seed_gives_the_same_trace() -> None:
    first, second, other = (synthetic_trace(tokens=9, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.expert, second.expert)
    assert np.array_equal(first.weight, second.weight)
    assert not np.array_equal(first.expert, other.expert)


def test_every_token_has_different_experts_and_weights_that_sum_to_one() -> None:
    trace = synthetic_trace(layers=2, experts=8, used=3, prompt=5, tokens=7)
    assert (np.diff(np.sort(trace.expert, axis=1), axis=1) > 0).all()
    assert trace.weight.sum(axis=1) == pytest.approx(1)
    assert len(trace.layer) == 2 * 12


def test_chance_has_no_order() -> None:
    trace = synthetic_trace(skew=0, stickiness=0, tokens=400)
    assert repeats(trace) == pytest.approx(trace.used / trace.experts, abs=0.02)
    assert popularity(trace) < 0.32


def test_order_is_that_which_was_asked_for() -> None:
    assert repeats(synthetic_trace(skew=0, stickiness=3, tokens=400)) > 0.4
    assert popularity(synthetic_trace(skew=1.5, stickiness=0, tokens=400, domain_tokens=10**6)) > 0.7
    settled = synthetic_trace(skew=1.5, stickiness=0, tokens=400, domain_tokens=10**6)
    switching = synthetic_trace(skew=1.5, stickiness=0, tokens=400, domain_tokens=20)
    assert popularity(switching) < popularity(settled) - 0.2
