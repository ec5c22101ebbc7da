"""A token's way through an attention layer in bfloat16, in kernels that have PyTorch's bits.

What these were not seen to reproduce is left to PyTorch, part by part. It knows linear layers, norms and PyTorch's
attention; not where weights come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.integrations import sdpa_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from undercroft.kernels import bitwise, bitwise_attention
from undercroft.kernels.bitwise_trunk import normalises, turn, turns
from undercroft.moe.attention import OTHERWISE
from undercroft.moe.kept import Kept
from undercroft.moe.usual_attention import LINEAR, NORMS, is_rms_norm, norms_of

_attentions: Any = ALL_ATTENTION_FUNCTIONS
_stock_attention: Any = sdpa_attention.sdpa_attention_forward  # pyright: ignore
_ATTENTION = "sdpa"


class Parts:
    """The way of one layer, as `token_attention.Way`.

    Args:
        layer: an attention layer whose forward is known.
        norms: of its queries and keys, or none.

    Attributes:
        fits: its heads are turned, and normalised, with PyTorch's bits.
    """

    def __init__(self, layer: Any, norms: Sequence[nn.Module]) -> None:
        self._linear: list[Any] = [getattr(layer, name) for name in LINEAR]
        self._norms = norms
        self._kept = Kept([(layer, name) for name in (*LINEAR, *NORMS[: len(norms)])])
        width: int = layer.head_dim
        self.heads = (layer.q_proj.out_features // width, layer.k_proj.out_features // width)
        self.fits = turns(width) and all(not norms or normalises(width, each) for each in self.heads)
        if self.fits:
            bitwise_attention.attends(*self.heads, width)  # is tried once, rather now than at the first token

    def takes(self, layer: Any, hidden: Tensor, mask: Tensor | None, options: Mapping[str, Any]) -> bool:
        """See `token_attention.Way`."""
        return (
            hidden.dtype is torch.bfloat16
            and bitwise.is_here(hidden)
            and not layer.training
            and layer.config._attn_implementation == _ATTENTION
            and self._kept.holds
        )

    @staticmethod
    def is_stock(layer: Any) -> bool:
        """Whether a layer would now let PyTorch's flash attention compute."""
        return (
            not layer.training
            and layer.config._attn_implementation == _ATTENTION
            and _attentions[_ATTENTION] is _stock_attention
            and torch.backends.cuda.flash_sdp_enabled()
        )

    def turned(self, hidden: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """See `token_attention.Way`."""
        x, cosines, sines = self._projected(hidden), cosines.contiguous(), sines.contiguous()
        if self._norms:
            queries, keys = cast("list[Any]", self._norms)
            turn(x, self.heads, cosines, sines, (queries.weight, keys.weight), queries.variance_epsilon)
        else:
            turn(x, self.heads, cosines, sines)
        return x

    def attend(
        self,
        layer: Any,
        states: tuple[Tensor, Tensor, Tensor],
        mask: Tensor | None,
        options: Mapping[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """See `token_attention.Way`."""
        attention = _attentions[_ATTENTION]
        is_stock = attention is _stock_attention and mask is None
        if (
            is_stock
            and all(options.get(name) is None for name in OTHERWISE)
            and bitwise_attention.takes(*states)
        ):
            return bitwise_attention.attend(*states, layer.scaling), None
        return attention(layer, *states, mask, dropout=0.0, scaling=layer.scaling, **options)

    def _projected(self, x: Tensor) -> Tensor:
        """One row's queries, keys and values, one behind another: (outputs of all)."""
        layers = [(each.weight, each.bias) for each in self._linear]
        if bitwise.takes_all(x, layers):
            return bitwise.side_by_side(x, layers)
        return torch.cat([each(x).flatten() for each in self._linear])


def parts(layer: nn.Module) -> Parts | None:
    """The way of a layer, if its forward is known and its weights are bfloat16 on the CPU."""
    norms, module = norms_of(layer), cast("Any", layer)
    if norms is None:
        return None
    linear = [getattr(module, name) for name in LINEAR]
    if not all(type(each) is nn.Linear for each in linear) or not all(map(is_rms_norm, norms)):
        return None
    weights = [each.weight for each in (*linear, *norms)]
    eps = {cast("Any", norm).variance_epsilon for norm in norms}
    if len(eps) > 1 or any(each.dtype is not torch.bfloat16 or not each.is_cpu for each in weights):
        return None
    found = Parts(module, norms)
    return found if found.fits else None
