"""Turns of many places at once have the bits of each alone, and those of models whose turns change are not kept."""

from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

from undercroft.moe.turns import Turns, has_turns

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
}


def rotary(kind: str, head: int) -> Any:
    return Qwen3MoeRotaryEmbedding(
        Qwen3MoeConfig(head_dim=head, max_position_embeddings=64, rope_parameters=ROPES[kind])
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", [16, 48, 128])
@pytest.mark.parametrize("kind", ["default", "linear", "yarn"])
def test_bit_for_bit(kind: str, head: int, dtype: torch.dtype) -> None:
    module = rotary(kind, head)
    assert has_turns(module)
    turns, hidden = Turns(module), torch.ones(1, 1, 8, dtype=dtype)
    for place in (*range(5, 80), 100_000, 3, 4, 70):
        wanted = torch.stack([each[0, 0] for each in module(hidden, torch.tensor([[place]]))])
        assert torch.equal(turns.at(place, hidden), wanted)


def test_other_frequencies_are_noticed() -> None:
    module = rotary("default", 16)
    turns, hidden = Turns(module), torch.ones(1, 1, 8)
    before = turns.at(7, hidden).clone()
    module.inv_freq.mul_(0.5)
    assert not torch.equal(before, turns.at(7, hidden))


def test_turns_that_depend_on_the_length_of_a_text_are_not_kept() -> None:
    assert not has_turns(rotary("dynamic", 16))
    assert not has_turns(torch.nn.Linear(2, 2))
