"""A mode in which whatever multiplies by a weight does so in kernels that have PyTorch's bits.

It knows torch's ways to multiply; not modules or experts. Nothing changes by it but the time that is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from undercroft.kernels import bitwise


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


_ways: dict[Any, Any] = {torch.nn.functional.linear: bitwise.linear}
