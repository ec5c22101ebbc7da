"""A token's way through a decoder layer in bfloat16, in kernels that have PyTorch's bits.

A layer has it only where these reproduce each of its parts. It knows linear layers, norms and routers; not where
weights or experts come from. Invariant: `holds` and `takes` have checked all that the kernels need to know of weights
and of the token, so that neither is asked again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from undercroft.kernels import bitwise, bitwise_attention, bitwise_router, bitwise_trunk
from undercroft.kernels.bitwise_trunk import BitwiseTrunk, lanes_of, lanes_of_heads
from undercroft.moe.exact_attention import Parts
from undercroft.moe.token_layer import Routed, Turns
from undercroft.moe.usual_layer import Usual, usual
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
    """The way of one layer, as `token_layer.Way`.

    Args:
        layer: its parts.
        attention: the way of its attention.
        trunk: the kernels for what is no product.
        lanes: of their sums.
    """

    def __init__(self, layer: Usual, attention: Parts, trunk: BitwiseTrunk, lanes: _Lanes) -> None:
        super().__init__(layer, attention.heads, torch.bfloat16)
        self._attention, self._trunk, self._lanes = attention, trunk, lanes
        self._weights = _Weights.of(layer)
        self._flat = [(weight, weight.shape) for weight in self._weights.flat()]
        self._least: list[float] = [norm.variance_epsilon for norm in (*layer.norms, *layer.head_norms[:1])]

    @property
    def holds(self) -> bool:
        """See `token_layer.Way`."""
        return self._is_same and self._attention.is_stock(self._layer.attention) and self._are_known

    def begin(self, hidden: Tensor, turns: Turns) -> Tensor:
        """See `token_layer.Way`."""
        weights, cosines, sines = self._weights, *(each.contiguous() for each in turns)
        x = self._trunk.rms_norm(hidden.contiguous(), weights.before, self._least[0], self._lanes.token)
        heads = bitwise.side_by_side(x, weights.linear)
        self._trunk.turn(heads, self.heads, cosines, sines, weights.heads, self._least[-1], self._lanes.head)
        return heads

    def end(self, hidden: Tensor, query: Tensor, keys: Tensor, values: Tensor) -> Routed:
        """See `token_layer.Way`."""
        weights = self._weights
        seen = self._attention.seen(self._layer.attention, query, keys, values)
        residual = self._trunk.add(hidden.contiguous(), bitwise.side_by_side(seen, [weights.out]))
        x = self._normalised(residual).view(1, -1)
        logits = bitwise.side_by_side(x, [(weights.router, None)])
        used, (among, rounded) = self._used, self._layer.routing
        found = bitwise_router.route(logits, used, among=among, rounded=rounded)
        shares, chosen = found or bitwise_router.stock_route(logits[None], used, among=among, rounded=rounded)
        return Routed(residual, x, shares, chosen)

    def add(self, residual: Tensor, experts: Tensor) -> Tensor:
        """See `token_layer.Way`."""
        return self._trunk.add(residual, experts.contiguous())

    def _normalise(self, residual: Tensor) -> Tensor:
        """See `UsualWay`."""
        return self._trunk.rms_norm(residual, self._weights.after, self._least[1], self._lanes.token)

    @property
    def _are_known(self) -> bool:
        return all(
            weight.dtype is torch.bfloat16
            and weight.is_cpu
            and weight.is_contiguous()
            and weight.shape == shape
            for weight, shape in self._flat
        )


def exact_layer(attention_of: Callable[[nn.Module], Parts | None], layer: nn.Module) -> ExactLayer | None:
    """The way of a layer whose forward is known and each of whose parts is reproduced here.

    Args:
        attention_of: the way of its attention layer, which is made once.
        layer: any module.
    """
    found, trunk = usual(layer), bitwise_trunk.load()
    attention = None if found is None else attention_of(found.attention)
    if found is None or attention is None or trunk is None or not _are_reproduced(found, attention.heads):
        return None
    token = lanes_of(found.router.weight.shape[1], 1)
    head = lanes_of_heads(found.attention.head_dim, attention.heads) if found.head_norms else _ANY_LANES
    return None if token is None or head is None else ExactLayer(found, attention, trunk, _Lanes(token, head))


def _are_reproduced(layer: Usual, heads: tuple[int, int]) -> bool:
    weights: Sequence[Tensor] = _Weights.of(layer).flat()
    router, out = layer.router, layer.out
    return (
        all(bitwise.is_weight(each) for each in weights)
        and bitwise.reproduces(router.weight.shape[1])
        and bitwise.reproduces(out.weight.shape[1])
        and bitwise_attention.attends(*heads, layer.attention.head_dim)
        and bitwise_router.routes(len(router.weight), router.top_k)
    )


def _linear(module: Any) -> tuple[Tensor, Tensor | None]:
    return module.weight, module.bias
