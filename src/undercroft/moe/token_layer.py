"""A whole decoder layer for one token in few calls, without asking each of its modules.

A layer whose forward is, instruction by instruction, Qwen3-MoE's or Mixtral's (`usual_layer`) does a single token of a
single row this way, and everything else its own. It knows this forward and its experts' way; not what computes the
other parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import get_ident
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from undercroft.kernels.linear import is_plain
from undercroft.moe.attention import OTHERWISE
from undercroft.moe.mixed import give_ways
from undercroft.moe.streamed import of_a_token

_WAY = "_undercroft_layer"
_ANY = torch.empty(0)

Turns = tuple[Tensor, Tensor]
"""Cosines and sines of a token's place in the text."""


class Routed(NamedTuple):
    """What goes into the experts of a layer, and what is added to it.

    Attributes:
        residual: (1, 1, width).
        x: (1, width), the same normalised.
        shares: (1, used), of the chosen.
        chosen: (1, used) int64.
    """

    residual: Tensor
    x: Tensor
    shares: Tensor
    chosen: Tensor


class Way(Protocol):
    """How the parts of one layer are computed.

    Attributes:
        heads: how many queries, and how many keys.
    """

    heads: tuple[int, int]

    @property
    def holds(self) -> bool:
        """Whether it does what the layer would, as that is now."""
        ...

    def takes(self, hidden: Tensor, turns: Turns) -> bool:
        """Whether it knows such a token, which is (1, 1, some width) on the CPU."""
        ...

    def begin(self, hidden: Tensor, turns: Turns) -> Tensor:
        """A token's queries and keys, turned by its place in the text, and its values, one head behind another."""
        ...

    def end(self, hidden: Tensor, query: Tensor, keys: Tensor, values: Tensor) -> Routed:
        """What attention adds to the token, and where it goes then."""
        ...

    def add(self, residual: Tensor, experts: Tensor) -> Tensor:
        """The sum of both, (1, 1, width)."""
        ...


class Walk:
    """A token's way through all layers that have one; whether it may be gone is asked once for all of them.

    Between the products of a large model no cache is warm, so that asking each layer takes a tenth of its time. What
    somebody changes about a model while a forward of it runs counts from the next on.

    Args:
        ways: of the layers.
    """

    def __init__(self, ways: Sequence[Way]) -> None:
        self._ways = ways
        self._thread: int | None = None

    @property
    def is_open(self) -> bool:
        """Whether a forward of this thread is under way whose token may go it."""
        return self._thread == get_ident()

    def open(self, *_: Any) -> None:
        """A forward begins."""
        is_watched = torch.is_autocast_enabled("cpu") or not is_plain(_ANY)
        self._thread = get_ident() if not is_watched and all(way.holds for way in self._ways) else None

    def close(self, *_: Any) -> None:
        """It ended."""
        self._thread = None


class _Kept(NamedTuple):
    """What a layer keeps: its way, and that of all; whose keys and values they are; its experts."""

    walk: Walk
    way: Way
    number: int
    experts: nn.Module


def shorten_layers(model: nn.Module, way_of: Callable[[nn.Module], Way | None]) -> int:
    """Let those layers of a model do a token this way that have one; how many there are."""
    found = {module: way for module in model.modules() if (way := way_of(module)) is not None}
    if found:
        walk = Walk(list(found.values()))
        give_ways(found, _Short, _WAY, lambda module: _kept(walk, found[module], module))
        model.register_forward_pre_hook(walk.open)
        model.register_forward_hook(walk.close, always_call=True)
    return len(found)


def _kept(walk: Walk, way: Way, layer: Any) -> _Kept:
    return _Kept(walk, way, layer.self_attn.layer_idx, layer.mlp.experts)


class _Short:
    """A token's way through a layer, before the layer's own class, which does what this does not."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the layer's own."""
        kept: _Kept = getattr(self, _WAY)
        way = kept.way
        past, turns = kwargs.get("past_key_values"), kwargs.get("position_embeddings")
        if (
            not kept.walk.is_open
            or past is None
            or turns is None
            or kwargs.get("attention_mask") is not None
            or any(kwargs.get(name) is not None for name in OTHERWISE)
            or args
            or type(hidden_states) is not Tensor
            or not hidden_states.is_cpu
            or hidden_states.shape[:-1] != (1, 1)
            or not way.takes(hidden_states, turns)
        ):
            stock: Any = super()
            return stock.forward(hidden_states, *args, **kwargs)
        queries, keys = way.heads
        heads = way.begin(hidden_states, turns).view(1, queries + 2 * keys, 1, -1)
        query, key, value = heads.tensor_split((queries, queries + keys), dim=1)
        key, value = past.update(key, value, kept.number)
        residual, x, shares, chosen = way.end(hidden_states, query, key, value)
        return way.add(residual, of_a_token(kept.experts, x, chosen, shares))
