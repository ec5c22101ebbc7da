"""A model's trunk where it need not be exact: in 8 bits, and in kernels of ours wherever these know the way.

It knows the order in which that is done; not what is in the way of it. Nobody gets it unasked.
"""

from __future__ import annotations

from functools import cache, partial

from transformers import PreTrainedModel

from undercroft.kernels import trunk
from undercroft.moe.attention import attend_here
from undercroft.moe.light_attention import joined
from undercroft.moe.light_layer import light_layer
from undercroft.moe.token_attention import shorten
from undercroft.moe.token_router import shorten_routers
from undercroft.moe.token_walk import shorten_model
from undercroft.moe.trunk import quantise_trunk, replace_norms


def lighten(model: PreTrainedModel, *, experts: int) -> None:
    """Put a trunk into 8 bits, and let kernels of ours compute what each token needs of it.

    Args:
        model: changed in place.
        experts: in a layer.
    """
    quantise_trunk(model, experts=experts)
    if trunk.available():
        replace_norms(model)
        if attend_here(model):
            once = cache(joined)
            shorten_model(model, partial(light_layer, once))
            shorten(model.modules(), once)
        shorten_routers(model)
