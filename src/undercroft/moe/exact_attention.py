"""A whole attention layer for one token in few calls that have PyTorch's bits, where transformers makes some thirty.

A layer whose forward is, instruction by instruction, Qwen3-MoE's, Qwen2-MoE's or Mixtral's does a single token of a
single row this way, in bfloat16 by PyTorch's attention or a kernel with its bits, and everything else its own. It knows
these forwards; not where weights come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.integrations import sdpa_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from undercroft.kernels import bitwise, bitwise_attention
from undercroft.kernels.bitwise_trunk import normalises, turn, turns
from undercroft.kernels.linear import is_plain
from undercroft.moe.attention import OTHERWISE
from undercroft.moe.mixed import put_before
from undercroft.moe.usual_attention import norms_of

_attentions: Any = ALL_ATTENTION_FUNCTIONS
_stock_attention: Any = sdpa_attention.sdpa_attention_forward  # pyright: ignore
_ATTENTION = "sdpa"
_LINEAR, _NORMS = ("q_proj", "k_proj", "v_proj"), ("q_norm", "k_norm")
_PARTS = "_undercroft_parts"


def shorten(modules: Sequence[nn.Module]) -> int:
    """Let those attention layers do a token this way that can; how many there are."""
    number = 0
    for module in modules:
        parts = _parts(module)
        if parts is not None:
            put_before(_Short, module)
            setattr(module, _PARTS, parts)
            number += 1
    return number


def is_here(x: Tensor) -> bool:
    """Whether a kernel may compute with a tensor of the CPU: in one piece, and nobody differentiates or casts."""
    return is_plain(x) and x.is_cpu and x.is_contiguous() and not torch.is_autocast_enabled("cpu")


class _Parts:
    """What a layer computes a token's queries, keys and values with.

    Attributes:
        heads: how many queries and how many keys.
        norms: of theirs, or none.
    """

    def __init__(self, layer: Any, norms: Sequence[nn.Module]) -> None:
        self._linear: list[Any] = [getattr(layer, name) for name in _LINEAR]
        self._norms = norms
        width: int = layer.head_dim
        self.heads = (layer.q_proj.out_features // width, layer.k_proj.out_features // width)
        self.fits = turns(width) and all(not norms or normalises(width, each) for each in self.heads)
        bitwise_attention.attends(*self.heads, width)  # is tried once, rather now than at the first token

    def are_of(self, layer: nn.Module) -> bool:
        """Whether these are a layer's parts still: an adapter may have taken their place."""
        # Each attribute of a module takes as long as a small product.
        now = layer._modules  # pyright: ignore[reportPrivateUsage]
        is_same = all(now[name] is each for name, each in zip(_LINEAR, self._linear, strict=True))
        return is_same and all(now[name] is each for name, each in zip(_NORMS, self._norms, strict=False))

    def projected(self, x: Tensor) -> Tensor:
        """One row's queries, keys and values, one behind another: (outputs of all)."""
        layers = [(each.weight, each.bias) for each in self._linear]
        if bitwise.takes_all(x, layers):
            return bitwise.side_by_side(x, layers)
        return torch.cat([each(x).flatten() for each in self._linear])

    def turn(self, x: Tensor, cosines: Tensor, sines: Tensor) -> None:
        """Normalise queries and keys, and turn them, in place."""
        if self._norms:
            queries, keys = cast("list[Any]", self._norms)
            norms = (queries.weight, keys.weight)
            turn(x, self.heads, cosines, sines, norms, queries.variance_epsilon)
        else:
            turn(x, self.heads, cosines, sines)


class _Short:
    """A token's way through a layer, before the layer's own class, which does what this does not."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the layer's own."""
        layer: Any = self
        parts: _Parts = getattr(layer, _PARTS)
        if not _is_token(layer, hidden_states) or past_key_values is None or not parts.are_of(layer):
            stock: Any = super()
            return stock.forward(
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        x = parts.projected(hidden_states)
        cosines, sines = position_embeddings
        parts.turn(x, cosines.contiguous(), sines.contiguous())
        (queries, keys), states = parts.heads, x.view(1, -1, 1, layer.head_dim)
        query, key, value = states.tensor_split((queries, queries + keys), dim=1)
        key, value = past_key_values.update(key, value, layer.layer_idx)
        seen, weights = _attend(layer, query, key, value, attention_mask, kwargs)
        return layer.o_proj(seen.reshape(1, 1, -1)), weights


def _attend(
    layer: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    attention: Any = _attentions[_ATTENTION]
    usual = attention is _stock_attention and mask is None
    usual = usual and all(kwargs.get(name) is None for name in OTHERWISE)
    if usual and bitwise_attention.takes(query, key, value):
        return bitwise_attention.attend(query, key, value, layer.scaling), None
    return attention(layer, query, key, value, mask, dropout=0.0, scaling=layer.scaling, **kwargs)


def _is_token(layer: Any, hidden: Tensor) -> bool:
    return (
        hidden.shape[:-1] == (1, 1)
        and hidden.dtype is torch.bfloat16
        and is_here(hidden)
        and not layer.training
        and layer.config._attn_implementation == _ATTENTION
    )


def _parts(layer: nn.Module) -> _Parts | None:
    """Those of a layer, if it is one of those known here."""
    norms, module = norms_of(layer), cast("Any", layer)
    if norms is None:
        return None
    linear = [getattr(module, name) for name in _LINEAR]
    weights = [each.weight for each in (*linear, *norms)]
    eps = {cast("Any", norm).variance_epsilon for norm in norms}
    if len(eps) > 1 or any(each.dtype is not torch.bfloat16 or not each.is_cpu for each in weights):
        return None
    parts = _Parts(module, norms)
    return parts if parts.fits else None
