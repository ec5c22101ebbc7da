"""Attention of one token, in a kernel of ours, for models that are not computed exactly.

transformers dispatches the attention of most families through one registry. What is registered here asks the kernel
where it computes the same, and transformers' own way by PyTorch for all else: prefill, masks, traced models. It knows
transformers' registries; not where keys and values are.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import sdpa_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from undercroft.kernels import trunk
from undercroft.kernels.linear import is_plain

_stock_attention: Any = sdpa_attention.sdpa_attention_forward  # pyright: ignore
IMPLEMENTATION = "undercroft"
"""What transformers calls this way to attend."""
_STOCK = "sdpa"
OTHERWISE = ("position_bias", "cache", "softcap")
"""Arguments that transformers' own way does something about."""


def attend_here(model: PreTrainedModel) -> bool:
    """Let a model attend this way, if its family can, it would have used PyTorch's, and there are kernels.

    A family stays as it is whose code asks for the stock way by name: it does something else beside all others.

    Returns:
        Whether it does now.
    """
    kinds = {type(each) for each in model.modules() if isinstance(each, PreTrainedModel)}
    can = _implementation(model) == _STOCK and trunk.available() and not any(map(_asks, kinds))
    if can:
        model.set_attn_implementation(IMPLEMENTATION)
    return can and _implementation(model) == IMPLEMENTATION


def _asks(kind: type) -> bool:
    """Whether a family's code names the stock way; also where its code cannot be read."""
    try:
        return f'"{_STOCK}"' in inspect.getsource(inspect.getmodule(kind) or kind)
    except OSError:
        return True


def _implementation(model: PreTrainedModel) -> str | None:
    return model.config._attn_implementation  # pyright: ignore[reportPrivateUsage]


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As `sdpa_attention_forward` of transformers, with the same arguments.

    Args:
        module: the attention layer.
        query: (batch, heads, tokens, width).
        key: (batch, key heads, all tokens, width).
        value: (batch, key heads, all tokens, value width).
        attention_mask: what may be seen; None for all that came before.
        dropout: share of what is seen that is left out.
        scaling: of products.
        kwargs: as there.

    Returns:
        (batch, tokens, heads, value width), and no weights.
    """
    usual = attention_mask is None and not dropout and all(kwargs.get(name) is None for name in OTHERWISE)
    if usual and is_plain(query) and trunk.attends(query, key, value):
        return trunk.attend(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling), None
    return _stock_attention(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, ALL_MASK_ATTENTION_FUNCTIONS[_STOCK])  # pyright: ignore
