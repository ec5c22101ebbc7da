"""Gives a small model the outlier channels of large ones, without changing what it computes.

Small models trained briefly hardly suffer from 4-bit weights; large ones do, for a few of their channels are far
larger than the rest (Dettmers et al. 2022, arXiv 2208.07339) and widen the range that a group of weights must cover.
Here such channels are made by rescaling. They are synthetic, and whoever reports a figure taken with them says so.
Invariant: scales are powers of two, which floating-point numbers take without rounding, so the model computes
bit for bit what it computed before, in float32 and in bfloat16, as long as nothing overflows.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from undercroft.errors import InvalidInput, UnsupportedModel

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def with_outliers(model: Model, scale: int = 64, *, every: int = 32, seed: int = 0) -> Model:
    """Rescale channels of every expert of a Mixture-of-Experts model, in place; the same seed takes the same ones.

    In every layer one of `every` input channels gets `scale` times larger expert weights: the norm before them gives
    `scale` times less, the router's weights make up for it. In every expert one of `every` intermediate channels gets
    a down projection up to `scale` times larger (a power of two, drawn for each expert), its rows of the up projection
    so much smaller; the activation acts on the gate's half only.

    Args:
        model: of the layout of transformers' Qwen3MoeForCausalLM, with fused experts.
        scale: a power of two.
        every: channels of which one becomes an outlier; divides the hidden and the intermediate size.
        seed: of the choice of channels.

    Returns:
        The same model.

    Raises:
        InvalidInput: the scale is no power of two, or `every` does not divide the sizes.
        UnsupportedModel: the model has another layout.
    """
    doublings = math.log2(scale) if scale > 0 else 0.5
    if doublings != int(doublings):
        raise InvalidInput(f"only powers of two rescale without rounding, and {scale} is none; try 64")
    dice = torch.Generator().manual_seed(seed)
    for layer in _layers(model):
        _rescale_inputs(layer, _channels(layer.mlp.gate.weight.shape[1], every, dice), scale)
        for expert in range(len(layer.mlp.experts.down_proj)):
            power = int(torch.randint(0, int(doublings) + 1, (), generator=dice))
            width = layer.mlp.experts.down_proj.shape[2]
            _rescale_between(layer.mlp.experts, expert, _channels(width, every, dice), 2**power)
    return model


def _layers(model: Any) -> list[Any]:
    try:
        layers = list(model.model.layers)
        fused = all(layer.mlp.experts.gate_up_proj.dim() == 3 for layer in layers)
        known = all(hasattr(layer.post_attention_layernorm, "weight") for layer in layers)
        if fused and known and all(layer.mlp.gate.weight.dim() == 2 for layer in layers):
            return layers
    except AttributeError:
        pass
    raise UnsupportedModel(
        f"{type(model).__name__} has not the layers of Qwen3-MoE with fused experts, so its channels stay as they are"
    )


def _channels(width: int, every: int, dice: torch.Generator) -> Tensor:
    """One channel out of each run of `every`."""
    if width % every:
        raise InvalidInput(f"one channel of {every} cannot be taken from {width}; take a divisor of it")
    return torch.arange(0, width, every) + torch.randint(0, every, (width // every,), generator=dice)


def _rescale_inputs(layer: Any, channels: Tensor, scale: int) -> None:
    layer.post_attention_layernorm.weight[channels] /= scale
    layer.mlp.gate.weight[:, channels] *= scale
    layer.mlp.experts.gate_up_proj[:, :, channels] *= scale


def _rescale_between(experts: Any, expert: int, channels: Tensor, scale: int) -> None:
    up = experts.gate_up_proj.shape[1] // 2 + channels
    experts.gate_up_proj[expert, up] /= scale
    experts.down_proj[expert][:, channels] *= scale
