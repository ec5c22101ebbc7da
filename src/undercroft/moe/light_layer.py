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
from undercroft.moe.kept import Kept
from undercroft.moe.light_attention import Joined
from undercroft.moe.token_layer import Routed, Turns
from undercroft.moe.trunk import Norm, PackedLinear
from undercroft.moe.usual_layer import Usual, usual


class LightLayer:
    """The way of one layer, as `token_layer.Way`.

    Args:
        layer: its parts, of which the linear layers are `PackedLinear` and the norms `Norm`.
        attention: the way of its attention.
        kernels: for what is no product.
    """

    def __init__(self, layer: Usual, attention: Joined, kernels: Trunk) -> None:
        self.heads = attention.heads
        self._layer, self._attention, self._kernels = layer, attention, kernels
        self._kept = Kept(layer.places, hooked=layer.norms[1:])
        self._settings = layer.settings()
        self._before, self._after = (norm.weight for norm in layer.norms)
        self._least: list[float] = [norm.variance_epsilon for norm in layer.norms]
        self._router: Tensor = layer.router.weight
        self._used: int = layer.router.top_k
        self._width: int = layer.attention.head_dim
        self._columns = self._router.shape[1]

    @property
    def holds(self) -> bool:
        """See `token_layer.Way`."""
        is_same = self._kept.holds and self._layer.settings() == self._settings
        return is_same and self._attention.is_here(self._layer.attention) and self._are_known

    def takes(self, hidden: Tensor, turns: Turns) -> bool:
        """See `token_layer.Way`."""
        dtype = hidden.dtype
        return (
            dtype is self._before.dtype
            and hidden.shape[2] == self._columns
            and all(each.dtype is dtype and each.is_cpu and each.numel() == self._width for each in turns)
        )

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

    def _normalised(self, residual: Tensor) -> Tensor:
        """By the norm before the experts, to which others may listen who want to know the residual."""
        norm = self._layer.norms[1]
        if norm._forward_pre_hooks:
            return norm(residual)
        return self._kernels.rms_norm(residual, self._after, self._least[1])

    @property
    def _are_known(self) -> bool:
        dtype = self._before.dtype
        return dtype in DTYPES and all(
            each.dtype is dtype and each.is_cpu and each.is_contiguous()
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
