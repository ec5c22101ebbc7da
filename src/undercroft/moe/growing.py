"""Keys and values that grow where they lie, where transformers copies all of a text's for each token.

It knows transformers' dynamic cache; not attention. Invariants: what a cache has given out is never overwritten, for a
token is added behind all that was; room is never more than `spare` tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

Attending = Callable[[Tensor], Callable[[int], object]]
"""Given the memory of all keys and values, what puts a token's there behind so many others, and attends to all."""


def spare(tokens: int) -> int:
    """For how many more there is room at most, behind so many."""
    return max(64, tokens // 8)


class GrowingLayer(DynamicLayer):
    """A layer of a dynamic cache, of one row, with room behind its keys and values; `grown` makes one of a layer.

    Whoever sets either takes both out of that memory. Copies and files have plain layers.

    Attributes:
        both: (2, heads, most tokens, width), keys and values; None where they are as they were set.
        tokens: that lie there.
    """

    both: Tensor | None
    tokens: int
    _given: list[Tensor | None]
    _attend: tuple[Attending, Callable[[int], object]] | None

    @property
    def keys(self) -> Tensor | None:  # pyright: ignore
        """(1, heads, tokens, width)."""
        return self._part(0)

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._give(0, value)

    @property
    def values(self) -> Tensor | None:  # pyright: ignore
        """(1, heads, tokens, width)."""
        return self._part(1)

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._give(1, value)

    @property
    def nbytes(self) -> int:
        """Of keys and values, without the room behind them."""
        if self.both is None:
            return sum(0 if each is None else each.nbytes for each in self._given)
        return self.both.nbytes // self.both.shape[2] * self.tokens

    def __reduce__(self) -> tuple[Any, ...]:
        """As a plain layer: two that grow in one place would put their next tokens there."""
        own = ("both", "tokens", "_given", "_attend")
        state = {name: value for name, value in vars(self).items() if name not in own}
        parts = [None if part is None else part.clone() for part in (self.keys, self.values)]
        return DynamicLayer, (), {**state, "keys": parts[0], "values": parts[1]}

    def add(self, attending: Attending) -> None:
        """One token more: its keys and values are put behind the others, and it attends to all."""
        both = self.both
        if both is None or both.shape[2] == self.tokens:
            both = self._moved()
        if self._attend is None or self._attend[0] is not attending:
            self._attend = attending, attending(both)
        self._attend[1](self.tokens)
        self.tokens += 1  # not before, for what breaks off leaves nothing there

    def _moved(self) -> Tensor:
        parts = [cast("Tensor", part) for part in (self.keys, self.values)]
        _, heads, tokens, width = parts[0].shape
        both = parts[0].new_empty(2, heads, tokens + spare(tokens), width)
        for to, part in zip(both, parts, strict=True):
            to[:, :tokens].copy_(part[0])
        self.both, self.tokens, self._given, self._attend = both, tokens, [None, None], None
        return both

    def _part(self, number: int) -> Tensor | None:
        if self.both is None:
            return self._given[number]
        return self.both[number : number + 1, :, : self.tokens]

    def _give(self, number: int, value: Tensor | None) -> None:
        self._given = [self.keys, self.values]
        self._given[number] = value
        self.both = self._attend = None


def grows(past: object) -> bool:
    """Whether a cache is of those whose layers all can be `GrowingLayer`s."""
    return type(past) is DynamicCache and all(
        type(layer) in (DynamicLayer, GrowingLayer) for layer in past.layers
    )


def grown(past: Any) -> list[GrowingLayer]:
    """The layers of such a cache, which are `GrowingLayer`s from now on."""
    for layer in past.layers:
        if type(layer) is DynamicLayer:
            own = vars(layer)
            given = [own.pop("keys"), own.pop("values")]
            cast("Any", layer).__class__ = GrowingLayer
            own.update(both=None, tokens=0, _given=given, _attend=None)
    return past.layers


class Growing:
    """Which caches can grow.

    Args:
        layers: of the model.
        heads: of keys, and of values.
        width: of a head.
        dtype: of all.
    """

    def __init__(self, layers: int, heads: int, width: int, dtype: torch.dtype) -> None:
        self._layers, self._heads, self._width, self._dtype = layers, heads, width, dtype

    def tokens(self, past: object) -> int | None:
        """How many a cache holds in each layer; None if it cannot grow, or they are none."""
        if type(past) is not DynamicCache or len(past.layers) != self._layers:
            return None
        known = {self._tokens(layer) for layer in past.layers}
        return known.pop() if len(known) == 1 else None

    def _tokens(self, layer: Any) -> int | None:
        both: Tensor | None = layer.both if type(layer) is GrowingLayer else None
        if both is not None:
            fits = both.shape[1::2] == (self._heads, self._width) and both.dtype is self._dtype
            return layer.tokens if fits else None
        if type(layer) not in (DynamicLayer, GrowingLayer) or not layer.is_initialized:
            return None
        keys, values = cast("Any", layer.keys), cast("Any", layer.values)
        return (
            keys.shape[2] if self._fits(keys) and values.shape == keys.shape and self._fits(values) else None
        )

    def _fits(self, states: Any) -> bool:
        fits = states.dim() == 4 and states.shape[::3] == (1, self._width) and states.shape[1] == self._heads
        return fits and states.dtype is self._dtype and states.is_cpu and states.shape[2] > 0
