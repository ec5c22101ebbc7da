"""Lets a model multiply in kernels that have PyTorch's bits, wherever PyTorch would have multiplied.

It knows modules and torch's ways to multiply; not experts. Nothing changes by it but the time that is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from undercroft.kernels import bitwise
from undercroft.moe.mixed import put_before


class Products(TorchFunctionMode):
    """Where it is entered, `torch.nn.functional.linear` is `bitwise.linear`."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Whatever was called, with its arguments."""
        return _ways.get(func, func)(*args, **(kwargs or {}))


def multiply_here(model: nn.Module) -> int:
    """Let a model's linear layers in bfloat16 use these products; how many there are that can."""
    found = [module for module in model.modules() if type(module) is nn.Linear and _is_known(module.weight)]
    for module in found:
        put_before(_Linear, module)
    return len(found)


class _Linear:
    """A linear layer's way, before the layer's own class."""

    def forward(self, input: Tensor) -> Tensor:
        """As the layer's own."""
        layer: Any = self
        return bitwise.linear(input, layer.weight, layer.bias)


def _is_known(weight: Tensor) -> bool:
    return weight.dtype is torch.bfloat16 and weight.is_cpu and bitwise.reproduces(weight.shape[1])


_ways: dict[Any, Any] = {torch.nn.functional.linear: bitwise.linear}
