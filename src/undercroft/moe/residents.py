"""Where the experts are that are in memory, as kernels take them: what a token wants is found without asking for each.

It knows layers, keys and blocks; not caches or kernels. Invariants: a row that does not begin with zero is where its
expert is, for as long as the cache does not let it go; whoever reads rows keeps the cache from that meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from undercroft.moe.stock import Stock
from undercroft.store.record import Key


class Residents:
    """The blocks of the full copies of some layers.

    Args:
        stock: which experts there are.
    """

    def __init__(self, stock: Stock) -> None:
        self._stock = stock
        self._tables: dict[int, NDArray[np.int64]] = {}

    def table(self, layer: int, experts: int, fields: int) -> NDArray[np.int64]:
        """Of a layer, (experts, fields), whose first field is zero for those that are not known to be in memory.

        Args:
            layer: which.
            experts: how many it has.
            fields: of a block; its first is never zero.
        """
        if layer not in self._tables:
            self._tables[layer] = np.zeros((experts, fields), dtype=np.int64)
        return self._tables[layer]

    def note(self, key: Key, block: Sequence[int]) -> None:
        """An expert is there, and held while this is said."""
        layer, expert, is_high = self._stock.places[key]
        if is_high and layer in self._tables:
            row = self._tables[layer][expert]
            row[1:] = block[1:]
            row[0] = block[0]  # last, for another thread may be looking

    def forget(self, key: Key) -> None:
        """It leaves."""
        layer, expert, is_high = self._stock.places[key]
        if is_high and layer in self._tables:
            self._tables[layer][expert, 0] = 0
