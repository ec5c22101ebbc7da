"""Synthetic outliers: the same function to the bit, larger channels, and weights that no longer fit few bits."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from undercroft.bundled.outliers import with_outliers
from undercroft.errors import InvalidInput, UnsupportedModel

TOKENS = torch.arange(24).view(2, 12)


def tiny_moe(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        tie_word_embeddings=True,
    )
    return Qwen3MoeForCausalLM(config).to(dtype).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [2, 64])
def test_the_function_stays_the_same_to_the_bit(dtype: torch.dtype, scale: int) -> None:
    model = tiny_moe(dtype)
    before = logits(model)
    assert with_outliers(model, scale) is model
    assert torch.equal(logits(model), before)


def test_each_rescaled_weight_is_compensated() -> None:
    plain, model = tiny_moe(), with_outliers(tiny_moe(), 64)
    for old, new in zip(plain.model.layers, model.model.layers, strict=True):
        grown = new.mlp.gate.weight / old.mlp.gate.weight
        channels = (grown == 64).all(0).nonzero().flatten()
        assert channels.numel() == 2  # one of 32, of 64
        assert torch.equal(
            new.post_attention_layernorm.weight[channels] * 64, old.post_attention_layernorm.weight[channels]
        )
        down = new.mlp.experts.down_proj / old.mlp.experts.down_proj
        assert (down.amax((1, 2)) <= 64).all()
        assert down.amax() > 1
        assert down.amin() == 1


def test_a_scale_of_one_changes_no_weight() -> None:
    plain, model = tiny_moe(), with_outliers(tiny_moe(), 1)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


def test_a_seed_chooses_the_channels() -> None:
    one, same, other = (with_outliers(tiny_moe(), seed=seed) for seed in (1, 1, 2))
    weights = [model.model.layers[0].mlp.experts.gate_up_proj for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("scale", [0, -2, 48])
def test_other_scales_would_round_and_are_refused(scale: int) -> None:
    with pytest.raises(InvalidInput, match="powers of two"):
        with_outliers(tiny_moe(), scale)


def test_channels_must_divide() -> None:
    model = tiny_moe()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(InvalidInput, match="divisor"):
        with_outliers(model, every=48)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_another_kind_of_model_is_refused() -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM"):
        with_outliers(LlamaForCausalLM(config))
