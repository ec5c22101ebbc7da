"""What ways of a token through a usual layer have in common, whoever computes its parts.

It knows `Usual` layers and whether they are what they were; not kernels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from undercroft.moe.kept import Kept
from undercroft.moe.token_layer import Turns
from undercroft.moe.usual_layer import Usual


class UsualWay(ABC):
    """Part of a `token_layer.Way`.

    Args:
        layer: its parts.
        heads: how many queries, and how many keys.
        dtype: of the tokens that it knows.
    """

    def __init__(self, layer: Usual, heads: tuple[int, int], dtype: torch.dtype) -> None:
        self.heads, self._layer, self._dtype = heads, layer, dtype
        self._kept = Kept(layer.places, hooked=layer.norms[1:])
        self._settings = layer.settings()
        self._width: int = layer.attention.head_dim
        self._columns: int = layer.router.weight.shape[1]
        self._used: int = layer.router.top_k

    @property
    def _is_same(self) -> bool:
        """Whether the layer is what it was, but for what its weights hold."""
        return self._kept.holds and self._layer.settings() == self._settings

    def takes(self, hidden: Tensor, turns: Turns) -> bool:
        """See `token_layer.Way`."""
        dtype = hidden.dtype
        return (
            dtype is self._dtype
            and hidden.shape[2] == self._columns
            and all(each.dtype is dtype and each.is_cpu and each.numel() == self._width for each in turns)
        )

    def _normalised(self, residual: Tensor) -> Tensor:
        """By the norm before the experts, to which others may listen who want to know the residual."""
        norm = self._layer.norms[1]
        return norm(residual) if norm._forward_pre_hooks else self._normalise(residual)

    @abstractmethod
    def _normalise(self, residual: Tensor) -> Tensor:
        """The same where nobody listens."""
