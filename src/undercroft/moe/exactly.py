"""Lets a model compute in kernels that have PyTorch's bits, wherever these know the way.

It knows modules; not experts. Nothing changes by it but the time that is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from undercroft.kernels import bitwise
from undercroft.kernels.bitwise_trunk import normalises, rms_norm
from undercroft.moe.exact_attention import parts
from undercroft.moe.exact_layer import exact_layer
from undercroft.moe.mixed import put_before
from undercroft.moe.token_attention import shorten
from undercroft.moe.token_walk import shorten_model
from undercroft.moe.usual_attention import is_rms_norm


def hasten(model: nn.Module) -> int:
    """Let whatever can of a model in bfloat16 do so, from the whole down to linear layers; how many modules that is.

    The largest come first: they look for the classes of their parts, which then get others before them.
    """
    modules, once = list(model.modules()), cache(parts)
    shortened = shorten_model(model, partial(exact_layer, once)) + shorten(modules, once)
    return shortened + _multiply_here(modules) + _normalise_here(modules)


def _multiply_here(modules: Sequence[nn.Module]) -> int:
    found = [module for module in modules if type(module) is nn.Linear and _is_known(module.weight)]
    taken = [module for module in found if bitwise.reproduces(module.in_features)]
    for module in taken:
        put_before(_Linear, module)
    return len(taken)


def _normalise_here(modules: Sequence[nn.Module]) -> int:
    found = [cast("Any", each) for each in modules if is_rms_norm(each)]
    taken = [norm for norm in found if _is_known(norm.weight) and normalises(norm.weight.numel())]
    for module in taken:
        put_before(_Norm, module)
    return len(taken)


class _Linear:
    """A linear layer's way, before the layer's own class."""

    def forward(self, input: Tensor) -> Tensor:
        """As the layer's own."""
        layer: Any = self
        return bitwise.linear(input, layer.weight, layer.bias)


class _Norm:
    """A norm's way for one token, before the norm's own class."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """As the norm's own."""
        norm: Any = self
        weight: Tensor = norm.weight
        is_token = hidden_states.numel() == weight.numel() and hidden_states.dtype is weight.dtype
        if is_token and weight.dtype is torch.bfloat16 and bitwise.is_here(hidden_states):
            return rms_norm(hidden_states, weight, norm.variance_epsilon)
        stock: Any = super()
        return stock.forward(hidden_states)


def _is_known(weight: Tensor) -> bool:
    return weight.dtype is torch.bfloat16 and weight.is_cpu
