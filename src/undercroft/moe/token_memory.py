"""Memory that one token after another is computed in, layer by layer, so that calls into it are made once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sizes(NamedTuple):
    """Of a token's way through a layer.

    Attributes:
        width: of the token.
        queries: heads.
        keys: heads, and as many of values.
        head: width of one.
        experts: that its router chooses from.
        used: that it chooses.
        dtype: of the token.
        shares: dtype of the chosen experts' shares.
    """

    width: int
    queries: int
    keys: int
    head: int
    experts: int
    used: int
    dtype: torch.dtype
    shares: torch.dtype


class TokenMemory:
    """All that one layer makes of a token, on the CPU; the next layer overwrites it.

    Args:
        sizes: of every layer.

    Attributes:
        hidden: (1, 1, width), what goes into a layer, and what comes out.
        x: (1, width), the same normalised.
        turns: (2, head), cosines and sines of the token's place in the text.
        heads: (1, queries + 2 * keys, 1, head): queries, keys and values.
        query: (1, queries, 1, head), of these.
        states: (2, keys, head), of these: keys, and values.
        seen: (1, 1, queries, head), what attention finds.
        product: (1, 1, width), what is added to the token.
        residual: (1, 1, width), their sum.
        logits: (1, experts), of the router.
        shares: (1, used), of the chosen.
        chosen: (1, used) int64.
    """

    def __init__(self, sizes: Sizes) -> None:
        width, head, dtype = sizes.width, sizes.head, sizes.dtype
        self.sizes = sizes
        self.hidden, self.residual, self.product = (_empty(1, 1, width, dtype=dtype) for _ in range(3))
        self.x = _empty(1, width, dtype=dtype)
        self.turns = _empty(2, head, dtype=dtype)
        self.heads = _empty(1, sizes.queries + 2 * sizes.keys, 1, head, dtype=dtype)
        self.query = self.heads[:, : sizes.queries]
        self.states = self.heads[0, sizes.queries :, 0].view(2, sizes.keys, head)
        self.seen = _empty(1, 1, sizes.queries, head, dtype=dtype)
        self.logits = _empty(1, sizes.experts, dtype=dtype)
        self.shares = _empty(1, sizes.used, dtype=sizes.shares)
        self.chosen = _empty(1, sizes.used, dtype=torch.int64)


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")
