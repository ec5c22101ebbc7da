"""A token's way through a decoder layer whose linear layers are packed, in kernels of ours.

It knows packed layers, norms and these kernels; not exact models, which `exact_layer` is for. Invariant: whoever runs
what `bind` gives has checked that weights are what they were.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from undercroft.kernels import trunk
from undercroft.kernels.linear import DTYPES
from undercroft.kernels.trunk import Trunk
from undercroft.moe.light_attention import Joined
from undercroft.moe.token_memory import TokenMemory
from undercroft.moe.token_walk import Bound
from undercroft.moe.trunk import Norm, PackedLinear
from undercroft.moe.usual_layer import Usual, usual
from undercroft.moe.usual_way import UsualWay


class LightLayer(UsualWay):
    """The way of one layer, as `token_walk.Way`.

    Args:
        layer: its parts, of which the linear layers are `PackedLinear` and the norms `Norm`.
        attention: the way of its attention.
        kernels: for what is no product.
    """

    def __init__(self, layer: Usual, attention: Joined, kernels: Trunk) -> None:
        weights = _weights(layer)
        super().__init__(layer, attention.heads, weights[0].dtype, weights)
        self._attention, self._kernels = attention, kernels

    @property
    def attends(self) -> bool:
        """See `token_walk.Way`."""
        return self._attention.is_here(self._layer.attention)

    def bind(self, memory: TokenMemory) -> Bound:
        """See `token_walk.Way`."""
        m, layer, kernels = memory, self._layer, self._kernels
        before, after = layer.norms
        out: PackedLinear = layer.out
        scale: float = layer.attention.scaling
        cosines, sines = m.turns
        bias = () if out.bias is None else (partial(m.product.add_, out.bias),)
        return Bound(
            begin=(
                kernels.normalising(m.hidden, before.weight, before.variance_epsilon, m.x),
                *self._attention.turning(m.x, m.heads, cosines, sines),
            ),
            attend=partial(kernels.attending, m.query, m.states, scale=scale, out=m.seen),
            end=(
                out.packed.multiplying(m.seen.view(1, -1), m.product),
                *bias,
                partial(torch.add, m.hidden, m.product, out=m.residual),
            ),
            normalise=kernels.normalising(m.residual, after.weight, after.variance_epsilon, m.x),
            route=kernels.routing(
                m.x, layer.router.weight, (m.logits, m.shares, m.chosen), among=layer.routing.among
            ),
            add=partial(torch.add, m.residual, m.product, out=m.hidden),
        )


def light_layer(attention_of: Callable[[nn.Module], Joined | None], layer: nn.Module) -> LightLayer | None:
    """The way of a layer whose forward is known, and its linear layers and norms are ours.

    Args:
        attention_of: the way of its attention layer, which joins its weights and is made once.
        layer: any module.
    """
    found, kernels = usual(layer, is_norm=lambda norm: isinstance(norm, Norm)), trunk.load()
    if found is None or kernels is None or not isinstance(found.out, PackedLinear):
        return None
    weights = _weights(found)
    fits = all(each.dtype in DTYPES and each.is_cpu and each.is_contiguous() for each in weights)
    if not fits or found.router.weight.shape[1] % trunk.STEP or len({each.dtype for each in weights}) > 1:
        return None
    attention = attention_of(found.attention)
    return None if attention is None else LightLayer(found, attention, kernels)


def _weights(layer: Usual) -> list[Tensor]:
    """Those that are not packed."""
    return [norm.weight for norm in (*layer.norms, *layer.head_norms, layer.router)]
