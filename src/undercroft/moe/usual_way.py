"""What ways of a token through a usual layer have in common, whoever computes its parts.

It knows `Usual` layers and whether they are what they were; not kernels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from undercroft.moe.token_memory import Sizes, TokenMemory
from undercroft.moe.token_walk import Bound
from undercroft.moe.usual_layer import Usual


class UsualWay(ABC):
    """A `token_walk.Way`.

    Args:
        layer: its parts.
        heads: how many queries, and how many keys.
        dtype: of the tokens that it knows.
        weights: all that it computes with.
    """

    def __init__(
        self, layer: Usual, heads: tuple[int, int], dtype: torch.dtype, weights: Sequence[Tensor]
    ) -> None:
        self.places: Sequence[tuple[nn.Module, str]] = layer.places
        self.hooked: nn.Module = layer.norms[1]
        self.experts: nn.Module = layer.experts
        self.weights = weights
        self.numbers: Sequence[tuple[nn.Module, str]] = layer.numbers()
        self._layer = layer
        router = layer.router
        self.sizes = Sizes(
            width=router.weight.shape[1],
            queries=heads[0],
            keys=heads[1],
            head=layer.attention.head_dim,
            experts=len(router.weight),
            used=router.top_k,
            dtype=dtype,
            shares=dtype if layer.routing.rounded else torch.float32,
        )

    @property
    def config(self) -> object:
        """See `token_walk.Way`."""
        return self._layer.attention.config

    @property
    @abstractmethod
    def attends(self) -> bool:
        """See `token_walk.Way`."""

    @abstractmethod
    def bind(self, memory: TokenMemory) -> Bound:
        """See `token_walk.Way`."""
