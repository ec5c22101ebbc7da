"""Cosines and sines of rotary embeddings, of many places in a text at once.

A model makes them anew for each token, in a dozen calls. It knows rotary modules as Llama's; not what is turned.
Invariant: they have the bits that the module gives for each place alone, or else they come from that.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

from undercroft.moe.alike import alike_throughout

_AHEAD = 64
_forward: Any = cast("Any", Qwen3MoeRotaryEmbedding).forward
_CHANGING = ("dynamic", "longrope")
"""Kinds whose turns depend on how long a text is."""


class Turns:
    """Those of one module.

    Args:
        rotary: the module, of which `has_turns`.
    """

    def __init__(self, rotary: nn.Module) -> None:
        self._rotary: Any = rotary
        self._frequencies, self._others = torch.empty(0), cast("tuple[Any, ...]", ())
        self._first, self._rows = 0, torch.empty(0)

    def at(self, place: int, hidden: Tensor) -> Tensor:
        """(2, width), cosines and sines.

        Args:
            place: in the text, from 0.
            hidden: of which the dtype is taken.
        """
        frequencies, others = self._rotary.inv_freq, (self._rotary.attention_scaling, hidden.dtype)
        is_known = others == self._others and torch.equal(frequencies, self._frequencies)
        if not is_known or not self._first <= place < self._first + len(self._rows):
            self._frequencies, self._others = frequencies.clone(), others
            self._first, self._rows = place, self._ahead(place, hidden)
        return self._rows[place - self._first]

    def _ahead(self, place: int, hidden: Tensor) -> Tensor:
        """(places, 2, width), of which both ends were seen to be right; else the first alone."""
        rows = self._made(torch.arange(place, place + _AHEAD, device="cpu"), hidden)
        ends = torch.stack(
            [self._made(torch.tensor([place + index], device="cpu"), hidden)[0] for index in (0, _AHEAD - 1)]
        )
        return rows if torch.equal(ends, rows[[0, -1]]) else ends[:1]

    def _made(self, places: Tensor, hidden: Tensor) -> Tensor:
        return torch.stack([each[0] for each in self._rotary(hidden, position_ids=places[None])], dim=1)


def has_turns(rotary: nn.Module) -> bool:
    """Whether a module is one whose turns of a place are always the same."""
    is_known = alike_throughout(type(rotary).forward, _forward)
    return is_known and getattr(rotary, "rope_type", None) not in _CHANGING
