"""A whole attention layer for one token in six calls, where transformers makes some forty.

Between the products of a large model no cache is warm, so a call that computes next to nothing costs as much as one
that multiplies a small matrix. A layer whose forward is, instruction by instruction, Qwen3-MoE's, Qwen2-MoE's or
Mixtral's does a single token of a single row this way, and everything else its own. It knows these three forwards; not
where weights come from.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from undercroft.errors import InvalidInput
from undercroft.kernels import trunk
from undercroft.kernels.linear import Weight, is_plain
from undercroft.moe.attention import OTHERWISE, attention
from undercroft.moe.mixed import put_before
from undercroft.moe.trunk import Norm, PackedLinear
from undercroft.moe.usual_attention import norms_of


def shorten(model: nn.Module) -> int:
    """Let those attention layers of a model do a token this way that can; how many there are.

    Their linear layers are `PackedLinear`, their norms `Norm`, and the model attends by `attention`.
    """
    number = 0
    for module in model.modules():
        joined = _joined(module)
        if joined is not None:
            put_before(_Short, module)
            setattr(module, _JOINED, joined)
            number += 1
    return number


class _Joined:
    """What a layer needs for one token.

    Attributes:
        weight: of queries, keys and values.
        bias: of these, or None.
        heads: how many queries and how many keys.
        norms: weights of theirs, or None.
        least: of the norms.

    Raises:
        InvalidInput: these parts cannot be joined.
    """

    def __init__(self, parts: list[PackedLinear], norms: list[Norm], width: int) -> None:
        biases = [part.bias for part in parts if part.bias is not None]
        if len(biases) not in (0, len(parts)) or len({norm.variance_epsilon for norm in norms}) > 1:
            raise InvalidInput("all parts have a bias or none, and norms are alike")
        self._parts = parts
        self.weight = Weight.joined([part.packed for part in parts])
        self.bias = torch.cat(list[Tensor](biases)) if biases else None
        self.heads = (parts[0].out_features // width, parts[1].out_features // width)
        self.norms = (norms[0].weight, norms[1].weight) if norms else None
        self.least = norms[0].variance_epsilon if norms else 0.0

    def is_of(self, layer: Any) -> bool:
        """Whether these are a layer's parts still: an adapter may have taken their place."""
        return [layer.q_proj, layer.k_proj, layer.v_proj] == self._parts


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
        joined: _Joined = getattr(layer, _JOINED)
        is_one = hidden_states.shape[:-1] == (1, 1) and attention_mask is None and is_plain(hidden_states)
        is_usual = joined.is_of(layer) and all(kwargs.get(name) is None for name in OTHERWISE)
        if past_key_values is None or not is_one or not is_usual:
            stock: Any = super()
            return stock.forward(
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        x = joined.weight(hidden_states)
        if joined.bias is not None:
            x += joined.bias
        cosines, sines = position_embeddings
        trunk.turn(x, joined.heads, cosines, sines, joined.norms, joined.least)
        (queries, keys), states = joined.heads, x.view(1, -1, 1, layer.head_dim)
        query, key, value = (
            states[:, :queries],
            states[:, queries : queries + keys],
            states[:, queries + keys :],
        )
        key, value = past_key_values.update(key, value, layer.layer_idx)
        seen, _ = attention(layer, query, key, value, None, scaling=layer.scaling)
        return layer.o_proj(seen.reshape(1, 1, -1)), None


_JOINED = "_undercroft_joined"


def _joined(layer: nn.Module) -> _Joined | None:
    """What a layer's parts make together, if it is one of those known here."""
    norms, module = norms_of(layer), cast("Any", layer)
    if norms is None or module.head_dim % trunk.STEP:
        return None
    parts = [module.q_proj, module.k_proj, module.v_proj]
    is_light = all(isinstance(part, PackedLinear) for part in parts)
    ours = [norm for norm in norms if isinstance(norm, Norm)]
    if not is_light or len(ours) < len(norms):
        return None
    try:
        return _Joined(parts, ours, module.head_dim)
    except InvalidInput:
        return None
