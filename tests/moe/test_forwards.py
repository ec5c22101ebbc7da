"""Forwards of a trace: every row of it, in order, and within the shape that is there."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from undercroft.errors import InvalidInput
from undercroft.moe.forwards import decoding, fold, forwards, twice
from undercroft.moe.synthetic import synthetic_trace
from undercroft.moe.trace import Trace


def small(layers: int = 3, experts: int = 8, used: int = 2) -> Trace:
    return synthetic_trace(layers=layers, experts=experts, used=used, prompt=4, tokens=5)


def test_forwards_are_the_steps_of_the_trace() -> None:
    trace = twice(small())
    made, steps = list(forwards(trace, 16, torch.bfloat16)), list(trace.steps())
    assert len(made) == len(steps) == 36
    for each, step in zip(made, steps, strict=True):
        assert (each.layer, each.is_first, each.is_prefill) == (step.layer, step.is_first, step.is_prefill)
        assert each.chosen.tolist() == step.experts.tolist()
        assert each.hidden.shape == (len(step.experts), 16)
        assert each.weights.dtype == each.hidden.dtype == torch.bfloat16
        assert torch.equal(each.weights, torch.from_numpy(step.weights.copy()).bfloat16())
    assert [place for place, each in enumerate(made) if each.begins] == [0, 18]


@given(layers=st.integers(2, 5), experts=st.integers(2, 9), seed=st.integers(0, 20))
def test_a_folded_trace_fits_and_has_every_use(layers: int, experts: int, seed: int) -> None:
    whole = synthetic_trace(layers=5, experts=9, used=2, prompt=3, tokens=4, seed=seed)
    folded = fold(whole, layers=layers, experts=experts, expert_nbytes=4096)
    assert (folded.layers, folded.experts, folded.used) == (layers, experts, 2)
    assert folded.expert_nbytes == dict.fromkeys(range(layers), 4096)
    assert folded.expert.shape == whole.expert.shape
    assert folded.step_count == whole.step_count
    assert folded.layer.max() < layers
    assert 0 <= folded.expert.min() <= folded.expert.max() < experts
    assert (folded.expert[:, 0] != folded.expert[:, 1]).all()
    same = whole.expert < experts
    assert (folded.expert[same.all(axis=1)] == whole.expert[same.all(axis=1)]).all()
    firsts = sum(step.is_first for step in folded.steps())
    assert firsts == sum(step.is_first for step in whole.steps()) * -(-5 // layers)


def test_a_trace_that_fits_is_only_given_other_sizes() -> None:
    trace = small()
    folded = fold(trace, layers=7, experts=8, expert_nbytes=77)
    assert folded.layers == 3
    for name in ("turn", "phase", "step", "layer", "expert", "weight"):
        assert np.array_equal(getattr(folded, name), getattr(trace, name)), name


@pytest.mark.parametrize(("layers", "experts"), [(1, 8), (3, 1)])
def test_a_shape_that_is_too_small_is_refused(layers: int, experts: int) -> None:
    with pytest.raises(InvalidInput, match="does not fold"):
        fold(small(), layers=layers, experts=experts, expert_nbytes=1)


def test_decoding_is_the_first_tokens_after_the_prompt_in_the_first_layers() -> None:
    trace = small()
    alone = decoding(trace, layers=2, tokens=3)
    steps = list(alone.steps())
    assert [step.layer for step in steps] == [0, 1] * 3
    assert not any(step.is_prefill for step in steps)
    assert alone.step.tolist() == [4, 4, 5, 5, 6, 6]
    assert set(alone.expert_nbytes) == {0, 1}
    assert decoding(trace, layers=9, tokens=99).layers == 3
    prompt = synthetic_trace(layers=2, experts=4, used=1, prompt=3, tokens=0)
    with pytest.raises(InvalidInput, match="no token is decoded"):
        decoding(prompt, layers=2, tokens=3)
