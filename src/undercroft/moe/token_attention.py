"""A whole attention layer for one token in few calls, where transformers makes some forty.

Between the products of a large model no cache is warm, so a call that computes next to nothing costs as much as one
that multiplies a small matrix. A layer whose forward is, instruction by instruction, Qwen3-MoE's, Qwen2-MoE's or
Mixtral's (`usual_attention`) does a single token of a single row this way, and everything else its own. It knows these
forwards; not what computes their parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from undercroft.moe.mixed import give_ways

_WAY = "_undercroft_attention"


class Way(Protocol):
    """How the parts of one layer are computed.

    Attributes:
        heads: how many queries, and how many keys.
    """

    heads: tuple[int, int]

    def takes(self, layer: Any, hidden: Tensor, mask: Tensor | None, options: Mapping[str, Any]) -> bool:
        """Whether it does what the layer would, for one token, with what else its forward was given."""
        ...

    def turned(self, hidden: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """A token's queries and keys, turned by its place in the text, and its values, one head behind another."""
        ...

    def attend(
        self,
        layer: Any,
        states: tuple[Tensor, Tensor, Tensor],
        mask: Tensor | None,
        options: Mapping[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """What queries see of all keys and values, (1, 1, heads, width), and weights if there are any."""
        ...


def shorten(modules: Iterable[nn.Module], way_of: Callable[[nn.Module], Way | None]) -> int:
    """Let those attention layers do a token this way that have one; how many there are."""
    return give_ways(modules, _Short, _WAY, way_of)


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
        way: Way = getattr(layer, _WAY)
        is_one = hidden_states.shape[:-1] == (1, 1)
        is_known = is_one and way.takes(layer, hidden_states, attention_mask, kwargs)
        if past_key_values is None or not is_known:
            stock: Any = super()
            return stock.forward(
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        turned = way.turned(hidden_states, *position_embeddings)
        (queries, keys), heads = way.heads, turned.view(1, -1, 1, layer.head_dim)
        query, key, value = heads.tensor_split((queries, queries + keys), dim=1)
        key, value = past_key_values.update(key, value, layer.layer_idx)
        seen, weights = way.attend(layer, (query, key, value), attention_mask, kwargs)
        return layer.o_proj(seen.reshape(1, 1, -1)), weights
