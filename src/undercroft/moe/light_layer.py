"""A token's way through a decoder layer whose linear layers are packed, in kernels of ours.

It knows packed layers, norms and these kernels; not exact models, which `exact_layer` is for. Invariant: `holds` and
`takes` have checked all that the kernels need to know of weights and of the token, so that neither is asked again.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from undercroft.kernels import trunk
from undercroft.kernels.linear import DTYPES
from undercroft.kernels.trunk import Trunk
from undercroft.moe.light_attention import Joined
from undercroft.moe.token_layer import Routed, Turns
from undercroft.moe.trunk import Norm, PackedLinear
from undercroft.moe.usual_layer import Usual, usual
from undercroft.moe.usual_way import UsualWay


class LightLayer(UsualWay):
    """The way of one layer, as `token_layer.Way`.

    Args:
        layer: its parts, of which the linear layers are `PackedLinear` and the norms `Norm`.
        attention: the way of its attention.
        kernels: for what is no product.
    """

    def __init__(self, layer: Usual, attention: Joined, kernels: Trunk) -> None:
        self._before, self._after = (norm.weight for norm in layer.norms)
        super().__init__(layer, attention.heads, self._before.dtype)
        self._attention, self._kernels = attention, kernels
        self._least: list[float] = [norm.variance_epsilon for norm in layer.norms]
        self._router: Tensor = layer.router.weight

    @property
    def holds(self) -> bool:
        """See `token_layer.Way`."""
        return self._is_same and self._attention.is_here(self._layer.attention) and self._are_known

    def begin(self, hidden: Tensor, turns: Turns) -> Tensor:
        """See `token_layer.Way`."""
        x = self._kernels.rms_norm(hidden.contiguous(), self._before, self._least[0])
        return self._attention.turned(x, *turns)

    def end(self, hidden: Tensor, query: Tensor, keys: Tensor, values: Tensor) -> Routed:
        """See `token_layer.Way`."""
        seen = self._attention.seen(self._layer.attention, query, keys, values)
        residual = hidden + self._layer.out.forward(seen.view(1, 1, -1))
        x = self._normalised(residual).view(1, -1)
        among, rounded = self._layer.routing
        _, shares, chosen = self._kernels.route(x, self._router, self._used, among=among, rounded=rounded)
        return Routed(residual, x, shares, chosen)

    def add(self, residual: Tensor, experts: Tensor) -> Tensor:
        """See `token_layer.Way`."""
        return residual + experts

    def _normalise(self, residual: Tensor) -> Tensor:
        """See `UsualWay`."""
        return self._kernels.rms_norm(residual, self._after, self._least[1])

    @property
    def _are_known(self) -> bool:
        return self._dtype in DTYPES and all(
            each.dtype is self._dtype and each.is_cpu and each.is_contiguous()
            for each in (self._before, self._after, self._router)
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
    fits = found.router.weight.shape[1] % trunk.STEP == 0
    attention = attention_of(found.attention) if fits else None
    return None if attention is None else LightLayer(found, attention, kernels)
