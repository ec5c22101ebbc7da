"""A token's way through a decoder layer in bfloat16, in kernels that have PyTorch's bits.

A layer has it only where these reproduce each of its parts. It knows linear layers, norms and routers; not where
weights or experts come from. Invariant: whoever runs what `bind` gives has checked that weights are what they were.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from undercroft.kernels import bitwise, bitwise_attention, bitwise_router, bitwise_trunk
from undercroft.kernels.bitwise_attention import BitwiseAttention
from undercroft.kernels.bitwise_trunk import BitwiseTrunk, lanes_of, lanes_of_heads
from undercroft.kernels.bound import Call
from undercroft.moe.exact_attention import Parts
from undercroft.moe.token_memory import TokenMemory
from undercroft.moe.token_walk import Bound
from undercroft.moe.usual_layer import Routing, Usual, usual
from undercroft.moe.usual_way import UsualWay

_ANY_LANES = 8  # where nothing is added up


class _Lanes(NamedTuple):
    """Of PyTorch's sums: over a token, and over a head."""

    token: int
    head: int


class _Weights(NamedTuple):
    """What a layer computes with, but for its experts; `linear` as `bitwise.side_by_side` takes it."""

    before: Tensor
    after: Tensor
    heads: tuple[Tensor, Tensor] | None
    linear: list[tuple[Tensor, Tensor | None]]
    out: tuple[Tensor, Tensor | None]
    router: Tensor

    @staticmethod
    def of(layer: Usual) -> _Weights:
        before, after = (norm.weight for norm in layer.norms)
        heads = [norm.weight for norm in layer.head_norms]
        linear, out = [_linear(each) for each in layer.linear], _linear(layer.out)
        return _Weights(
            before, after, (heads[0], heads[1]) if heads else None, linear, out, layer.router.weight
        )

    def flat(self) -> list[Tensor]:
        """All of them."""
        pairs = (self.heads or (), self.out, *self.linear)
        each = (self.before, self.after, self.router, *(weight for pair in pairs for weight in pair))
        return [weight for weight in each if weight is not None]


class ExactLayer(UsualWay):
    """The way of one layer, as `token_walk.Way`.

    Args:
        layer: its parts.
        attention: the way of its attention.
        kernels: for attention, and for what is no product.
        lanes: of their sums.
    """

    def __init__(
        self, layer: Usual, attention: Parts, kernels: tuple[BitwiseAttention, BitwiseTrunk], lanes: _Lanes
    ) -> None:
        self._all = _Weights.of(layer)
        super().__init__(layer, attention.heads, torch.bfloat16, self._all.flat())
        self._attention, self._lanes = attention, lanes
        self._attend, self._trunk = kernels

    @property
    def attends(self) -> bool:
        """See `token_walk.Way`."""
        return self._attention.is_stock(self._layer.attention)

    def bind(self, memory: TokenMemory) -> Bound:
        """See `token_walk.Way`."""
        m, layer, weights, trunk, lanes = memory, self._layer, self._all, self._trunk, self._lanes
        before, after = (norm.variance_epsilon for norm in layer.norms)
        least: float = layer.head_norms[0].variance_epsilon if layer.head_norms else 0.0
        scale: float = layer.attention.scaling
        cosines, sines = m.turns
        return Bound(
            begin=(
                trunk.normalising(m.hidden, weights.before, before, lanes.token, m.x),
                bitwise.multiplying(m.x, weights.linear, m.heads),
                trunk.turning(
                    m.heads, self._attention.heads, cosines, sines, weights.heads, least, lanes.head
                ),
            ),
            attend=partial(self._attend.attending, m.query, m.states, scale=scale, out=m.seen),
            end=(
                bitwise.multiplying(m.seen, [weights.out], m.product),
                trunk.adding(m.hidden, m.product, m.residual),
            ),
            normalise=trunk.normalising(m.residual, weights.after, after, lanes.token, m.x),
            route=_routing(m, weights.router, layer.routing),
            add=trunk.adding(m.residual, m.product, m.hidden),
        )


def _routing(memory: TokenMemory, weight: Tensor, routing: Routing) -> Callable[[], None]:
    score = bitwise.multiplying(memory.x, [(weight, None)], memory.logits)
    choose = bitwise_router.routing(memory.logits, memory.shares, memory.chosen, among=routing.among)
    return partial(_route, memory, routing, score, choose)


def _route(memory: TokenMemory, routing: Routing, score: Call, choose: Call) -> None:
    score()
    if not choose.function(*choose.arguments):
        shares, chosen = bitwise_router.stock_route(memory.logits, memory.sizes.used, **routing._asdict())
        memory.shares.copy_(shares)
        memory.chosen.copy_(chosen)


def exact_layer(attention_of: Callable[[nn.Module], Parts | None], layer: nn.Module) -> ExactLayer | None:
    """The way of a layer whose forward is known and each of whose parts is reproduced here.

    Args:
        attention_of: the way of its attention layer, which is made once.
        layer: any module.
    """
    found, attend, trunk = usual(layer), bitwise_attention.load(), bitwise_trunk.load()
    attention = None if found is None else attention_of(found.attention)
    if found is None or attention is None or attend is None or trunk is None:
        return None
    if not _are_reproduced(found, attention.heads):
        return None
    token = lanes_of(found.router.weight.shape[1], 1)
    head = lanes_of_heads(found.attention.head_dim, attention.heads) if found.head_norms else _ANY_LANES
    lanes = None if token is None or head is None else _Lanes(token, head)
    return None if lanes is None else ExactLayer(found, attention, (attend, trunk), lanes)


def _are_reproduced(layer: Usual, heads: tuple[int, int]) -> bool:
    router, out = layer.router, layer.out
    return (
        all(bitwise.is_weight(each) for each in _Weights.of(layer).flat())
        and bitwise.reproduces(router.weight.shape[1])
        and bitwise.reproduces(out.weight.shape[1])
        and bitwise_attention.attends(*heads, layer.attention.head_dim)
        and bitwise_router.routes(len(router.weight), router.top_k)
    )


def _linear(module: Any) -> tuple[Tensor, Tensor | None]:
    return module.weight, module.bias
