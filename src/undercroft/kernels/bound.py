"""A native call whose arguments stay as they are, so that they are made once.

Between the products of a large model no cache is warm, and then to make a call's arguments and the memory for its
result takes longer than many a call. Who computes token after token in the same memory does both once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class Call(NamedTuple):
    """A C function, all that it is called with, and the tensors and arrays whose addresses that has.

    Attributes:
        function: answers whether it could; some answer more, and are not to be called as this is.
        arguments: as it takes them.
        tensors: which live as long as this does.
    """

    function: Callable[..., int]
    arguments: tuple[Any, ...]
    tensors: tuple[Tensor | NDArray[np.int64], ...]

    def __call__(self) -> None:
        """Do it.

        Raises:
            MemoryError: there was none for what it computes with.
        """
        require_memory(bool(self.function(*self.arguments)))


def require_memory(done: bool) -> None:
    """What a kernel answered.

    Raises:
        MemoryError: that it had none.
    """
    if not done:
        raise MemoryError("no memory for what a kernel computes with")
