"""Keeps what was routed where, for a trace."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from undercroft.moe.stock import Stock
from undercroft.moe.trace import Trace


class Journal:
    """The routing of a run, in the order in which it happened.

    Args:
        stock: of the model that runs.
    """

    def __init__(self, stock: Stock) -> None:
        self._stock = stock
        self._places: list[tuple[int, int, int, int]] = []
        self._experts: list[NDArray[np.int32]] = []
        self._weights: list[NDArray[np.float64]] = []
        self._turn, self._step, self._is_prefill = -1, 0, True

    def turn_to(self, *, is_first: bool, is_prefill: bool) -> None:
        """A forward begins, perhaps the first of a sequence."""
        self._turn += is_first
        self._step = 0 if is_first else self._step + 1
        self._is_prefill = is_prefill

    def note(self, layer: int, experts: NDArray[np.int64], weights: NDArray[np.float32]) -> None:
        """What a forward wants of a layer: both are (tokens, used)."""
        phase = 0 if self._is_prefill else 1
        self._places += [(max(self._turn, 0), phase, self._step, layer)] * len(experts)
        self._experts.append(experts.astype(np.int32))
        self._weights.append(weights.astype(np.float64))

    def trace(self) -> Trace:
        """All of it."""
        turn, phase, step, layer = np.array(self._places, dtype=np.int32).reshape(-1, 4).T.copy()
        none = np.empty((0, self._stock.used))
        return Trace(
            layers=self._stock.layers,
            experts=self._stock.experts,
            used=self._stock.used,
            turn=turn,
            phase=phase,
            step=step,
            layer=layer,
            expert=np.concatenate([none.astype(np.int32), *self._experts]),
            weight=np.concatenate([none, *self._weights]),
            expert_nbytes=dict(enumerate(self._stock.high_nbytes)),
        )
