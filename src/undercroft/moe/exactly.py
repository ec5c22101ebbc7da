"""Lets a model compute in kernels that have PyTorch's bits, wherever these know the way.

It knows modules and torch's ways to multiply; not experts. Nothing changes by it but the time that is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from undercroft.kernels import bitwise
from undercroft.kernels.bitwise_trunk import normalises, rms_norm
from undercroft.moe.alike import alike
from undercroft.moe.exact_attention import parts
from undercroft.moe.mixed import put_before
from undercroft.moe.token_attention import shorten


def products_of(x: Tensor) -> AbstractContextManager[object]:
    """What to enter to multiply with a tensor: `Products` where these may take it, else nothing."""
    return Products() if x.dtype is torch.bfloat16 and x.is_cpu else nullcontext()


class Products(TorchFunctionMode):
    """Where it is entered, `torch.nn.functional.linear` is `bitwise.linear`."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Whatever was called, with its arguments."""
        return _ways.get(func, func)(*args, **(kwargs or {}))


def hasten(model: nn.Module) -> int:
    """Let linear layers, norms and attention layers of a model in bfloat16 do so; how many there are that can."""
    modules = list(model.modules())
    return _multiply_here(modules) + _normalise_here(modules) + shorten(modules, parts)


def _multiply_here(modules: Sequence[nn.Module]) -> int:
    found = [module for module in modules if type(module) is nn.Linear and _is_known(module.weight)]
    taken = [module for module in found if bitwise.reproduces(module.in_features)]
    for module in taken:
        put_before(_Linear, module)
    return len(taken)


def _normalise_here(modules: Sequence[nn.Module]) -> int:
    found = [cast("Any", each) for each in modules if alike(type(each).forward, LlamaRMSNorm.forward)]
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


_ways: dict[Any, Any] = {torch.nn.functional.linear: bitwise.linear}
