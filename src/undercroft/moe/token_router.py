"""Where one token goes in one call, where transformers makes six.

A router whose forward is, instruction by instruction, Qwen3-MoE's or Mixtral's does a single token this way, and
everything else its own. It knows these two; not who is asked for experts then.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from undercroft.kernels import trunk
from undercroft.kernels.linear import is_plain
from undercroft.moe.alike import alike
from undercroft.moe.mixed import give_ways

_QWENS: Any = Qwen3MoeTopKRouter.forward  # pyright: ignore
_MIXTRALS: Any = MixtralTopKRouter.forward  # pyright: ignore
_WAY = "_undercroft_way"


class _Way(NamedTuple):
    """How a router weighs those that it chose; see `trunk.route`."""

    among: bool
    rounded: bool


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


def _way(module: nn.Module) -> _Way | None:
    """A router's, if it is one of those known here."""
    router: Any = module
    forward = type(module).forward
    is_qwens = alike(forward, _QWENS)
    if not (is_qwens or alike(forward, _MIXTRALS)) or router.weight.shape[-1] % trunk.STEP:
        return None
    return _Way(router.norm_topk_prob, rounded=True) if is_qwens else _Way(among=True, rounded=False)
