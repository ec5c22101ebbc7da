"""What most families do with one expert: two products and an activation between them, for one token or many.

It knows torch and the kernels that have its bits; not where parameters come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers.activations import ACT2FN

from undercroft.kernels import bitwise
from undercroft.moe.bank import GATED

_GATE_UP, _DOWN = GATED
_SERIAL = 2**15
"""Elements below which PyTorch computes what is elementwise in one piece; pieces end where they like."""
_SILU: Any = tuple(type(ACT2FN[name]) for name in ("silu", "swish"))  # pyright: ignore


class FeedForward(NamedTuple):
    """A gated feed-forward block.

    Attributes:
        act_fn: between its two products.
    """

    act_fn: Any

    @property
    def is_silu(self) -> bool:
        """Whether `Block`s do the same."""
        return isinstance(self.act_fn, _SILU)

    def __call__(self, x: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Of tokens (tokens, width) and an expert's parameters."""
        gate, up = linear(x, parts[_GATE_UP]).chunk(2, dim=-1)
        return linear(self.act_fn(gate) * up, parts[_DOWN])

    def of_each(self, x: Tensor, experts: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """What each expert makes of one token (1, width), (experts, width): the bits are those of a call for each."""
        if not _are_bitwise(x, experts):
            made = [self(x, parts) for parts in experts]
            return made[0] if len(made) == 1 else torch.cat(made)
        gates, ups = bitwise.gates_and_ups(x, [parts[_GATE_UP] for parts in experts])
        return bitwise.row_by_row(self._activated(gates) * ups, [parts[_DOWN] for parts in experts])

    def _activated(self, gates: Tensor) -> Tensor:
        """Rows (experts, inner) as if each were by itself.

        A vectorised SiLU has other bits than the one for what no vector is filled with; no row leaves such a rest, for
        `bitwise.PLACES` divides its length.
        """
        if self.is_silu and gates.numel() < _SERIAL:
            return self.act_fn(gates)
        return torch.cat([self.act_fn(gates[row : row + 1]) for row in range(len(gates))])


def _are_bitwise(x: Tensor, experts: Sequence[Mapping[str, Tensor]]) -> bool:
    """Whether the kernels that have PyTorch's bits take these experts, which are of one shape."""
    inner = experts[0][_DOWN].shape[-1]
    return (
        bitwise.takes_all(x, [(parts[_GATE_UP], None) for parts in experts])
        and bitwise.reproduces(inner)
        and all(bitwise.knows(inner, parts[_DOWN]) for parts in experts)
    )
