"""Where the experts are that are in memory, as kernels take them: what a token wants is found without asking for each.

It knows layers, keys and blocks; not caches or kernels. Invariants: a row that is not zeros is where its expert is,
for as long as the cache does not let it go; whoever reads rows keeps the cache from that meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from undercroft.moe.stock import Stock
from undercroft.store.record import Key


class Residents:
    """The blocks of the full copies of some layers.

    Args:
        stock: which experts there are.
    """

    def __init__(self, stock: Stock) -> None:
        self._stock = stock
        self._tables: dict[int, Tensor] = {}

    def table(self, layer: int, experts: int, fields: int) -> Tensor:
        """Of a layer, (experts, fields) int64, zeros for those that are not known to be in memory.

        Args:
            layer: which.
            experts: how many it has.
            fields: of a block; its first is never zero.
        """
        if layer not in self._tables:
            self._tables[layer] = torch.zeros(experts, fields, dtype=torch.int64, device="cpu")
        return self._tables[layer]

    def note(self, key: Key, block: Sequence[int]) -> None:
        """An expert is there, and held while this is said."""
        layer, expert, is_high = self._stock.places[key]
        if is_high and layer in self._tables:
            self._tables[layer][expert] = torch.tensor(block, dtype=torch.int64)

    def forget(self, key: Key) -> None:
        """It leaves."""
        layer, expert, is_high = self._stock.places[key]
        if is_high and layer in self._tables:
            self._tables[layer][expert] = 0
