"""Where one token goes in one call, where transformers makes six.

A router whose forward is, instruction by instruction, Qwen3-MoE's or Mixtral's does a single token this way, and
everything else its own. It knows these two; not who is asked for experts then.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from undercroft.kernels import trunk
from undercroft.kernels.linear import is_plain
from undercroft.moe.mixed import give_ways
from undercroft.moe.usual_layer import Routing, routing_of

_WAY = "_undercroft_way"


def shorten_routers(model: nn.Module) -> int:
    """Let those routers of a model choose for a token this way that can; how many there are."""
    return give_ways(model.modules(), _Short, _WAY, _way)


class _Short:
    """A token's way through a router, before the router's own class, which does what this does not."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As the router's own."""
        router: Any = self
        weight, way = router.weight, getattr(router, _WAY)
        is_one = hidden_states.numel() == weight.shape[1] and hidden_states.dtype is weight.dtype
        if is_one and is_plain(hidden_states):
            x = hidden_states.reshape(1, -1)
            return trunk.route(x, weight, router.top_k, among=way.among, rounded=way.rounded)
        stock: Any = super()
        return stock.forward(hidden_states)


def _way(module: nn.Module) -> Routing | None:
    """A router's, if it is one of those known here."""
    routing = routing_of(module)
    return routing if routing is not None and cast("Any", module).weight.shape[-1] % trunk.STEP == 0 else None
