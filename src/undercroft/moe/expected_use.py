"""Evict what will not be wanted for longest, by what each expert's chance of being wanted next is now.

It knows layers, uses and sizes of copies; not bytes in memory or gate weights. The rule, with the chance p that
a token wants an expert, and d the layer steps until its layer is served again, is to evict the largest expected
time to its next use, d + L (1 - p) / p layer steps. The distance makes it immune to cyclic order, at which LRU hits
nothing when memory is smaller than one token's demand.

The chance is a mixture of four views: what the last token wanted, the last 16 or so, the last 256 or so, and
that all are alike. None is right for every model and text, so their weights are learned as those of any mixture of
distributions: each use raises the weight of the views that had expected it (a step of online expectation
maximisation). Where routing is pure chance, the last view wins and nothing is believed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from undercroft.errors import InvalidInput
from undercroft.moe.layered import Layered, Standing, Wanted
from undercroft.moe.stock import Stock
from undercroft.store.record import Key

_RATES = np.array([1.0, 1 / 16, 1 / 256, 0.0])
"""How much of each view the newest token is; the last view is fixed: all experts are alike."""
_LONG = 256
"""Tokens from which on the newest is no more of any view than its rate."""
_LEARNING = 0.1
"""How much the weights follow one token, all layers together: ten tokens of a new text tell which view holds."""
_LEAST_WEIGHT = 0.01
"""No view is given up for good, and no expert's chance is ever none."""
_CLASS_RATE = 1 / 16
"""How much of an expert's share of low uses the newest use is."""
_LEAST_WORTH = 1e-9
_IDLE = 1e15
"""The urge of what is worth nothing: above all others."""


class _Urges(NamedTuple):
    """Of the copies of a layer's experts, how soon they should leave; reckoned when room is first needed.

    Attributes:
        high: of each high copy.
        low: of each low one, if there are any.
    """

    high: Sequence[float]
    low: Sequence[float]


class ExpectedUse(Layered):
    """Largest expected time to the next use first; a byte counts for what its absence would cost.

    What a service teaches is learned when somebody first asks. Where all is in memory nobody does, and many lessons in
    a row cost a quarter of as many between the products of a model, which leave no cache warm.

    A high copy saves the bytes of itself at a high use and those of a low copy at a low one; a low copy saves itself
    at a low use, and nothing while the high copy is there too. Per byte of the copy this scales the chance.

    Args:
        stock: which experts there are.
    """

    def __init__(self, stock: Stock) -> None:
        super().__init__(stock)
        prior = stock.used / stock.experts
        self._views = np.full((stock.layers, len(_RATES), stock.experts), prior)
        self._weights = np.full(len(_RATES), 1 / len(_RATES))
        self._seen = [0] * stock.layers
        self._chances = np.full((stock.layers, stock.experts), prior)
        self._low_shares = np.full((stock.layers, stock.experts), 0.5)
        ratios = zip(stock.low_nbytes, stock.high_nbytes, strict=False)
        self._low_costs = [low / high for low, high in ratios]
        self._distances = [*range(stock.layers)] * 2
        self._urges: list[_Urges | None] = [None] * stock.layers
        # They wait until somebody asks. Where all has room for longer than any view remembers, the oldest are let go.
        self._lessons: deque[tuple[int, Sequence[Wanted], int]] = deque(maxlen=_LONG * stock.layers)

    def turn_to(self, layer: int, wanted: Sequence[Wanted] = (), tokens: int = 1) -> None:
        """See `ExpertPolicy`."""
        self._lessons.append((layer, wanted, tokens))
        self._now = layer
        self._unsorted.add(layer)

    def victims(self) -> Iterator[Key]:
        """See `EvictionPolicy`."""
        self._catch_up()
        return super().victims()

    def chance(self, layer: int, expert: int) -> float:
        """The chance that a token wants an expert, 0 to 1, as of the last service of its layer."""
        self._catch_up()
        return float(self._chances[layer, expert])

    def insert(self, key: Key) -> None:
        """See `EvictionPolicy`."""
        super().insert(key)
        self._review_sibling(key)

    def remove(self, key: Key) -> None:
        """See `EvictionPolicy`."""
        super().remove(key)
        self._review_sibling(key)

    def state(self) -> dict[str, Any]:
        """See `ExpertPolicy`."""
        self._catch_up()
        return {
            "views": np.round(self._views, 6).tolist(),
            "weights": self._weights.tolist(),
            "seen": list(self._seen),
            "low_shares": np.round(self._low_shares, 6).tolist(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `ExpertPolicy`."""
        views = _shares(state, "views", self._views.shape)
        weights = _shares(state, "weights", self._weights.shape)
        low_shares = _shares(state, "low_shares", (self._stock.layers, self._stock.experts))
        seen = _array(state, "seen", (self._stock.layers,))
        self._lessons.clear()
        self._views, self._weights = views, _floored(weights)
        self._low_shares = low_shares
        self._seen = [int(number) for number in seen]
        self._chances = self._weights @ self._views
        self._urges = [None] * self._stock.layers
        self._unsorted.update(range(self._stock.layers))

    def _catch_up(self) -> None:
        lessons = [*self._lessons]
        self._lessons.clear()
        lasts = {layer: number for number, (layer, wanted, _) in enumerate(lessons) if wanted}
        for number, (layer, wanted, tokens) in enumerate(lessons):
            if wanted:
                self._learn(layer, wanted, tokens)
            if lasts.get(layer) == number:  # what comes of the views is asked for then at the earliest
                self._chances[layer] = self._weights @ self._views[layer]
                self._urges[layer] = None

    def _learn(self, layer: int, wanted: Sequence[Wanted], tokens: int) -> None:
        experts = [each.expert for each in wanted]
        views = self._views[layer]
        expected = views[:, experts]
        if tokens == 1:
            self._reweigh(expected)
        self._seen[layer] += tokens
        gains = self._gains(layer, tokens)
        views *= 1 - gains
        views[:, experts] += (
            gains * (np.array([each.tokens for each in wanted]) / tokens) if tokens > 1 else gains
        )
        if self._low_costs:
            self._learn_classes(layer, experts, wanted)

    def _gains(self, layer: int, tokens: int) -> NDArray[np.float64]:
        """How much of each view the newest tokens are: at least as much as of the mean of all so far."""
        if tokens == 1 and self._seen[layer] > _LONG:
            return _RATES[:, None]
        gains = 1 - (1 - _RATES) ** tokens
        gains[:-1] = np.maximum(gains[:-1], tokens / (self._seen[layer] + 1))
        return gains[:, None]

    def _reweigh(self, expected: NDArray[np.float64]) -> None:
        """Follow the views that had expected these uses; `expected` is (views, uses)."""
        parts = self._weights[:, None] * expected
        credit = (parts / parts.sum(axis=0)).sum(axis=1) / parts.shape[1]
        self._weights = _floored(self._weights + _LEARNING / self._stock.layers * (credit - self._weights))

    def _learn_classes(self, layer: int, experts: list[int], wanted: Sequence[Wanted]) -> None:
        shares = self._low_shares[layer]
        is_low = np.array([not each.is_high for each in wanted])
        shares[experts] += _CLASS_RATE * (is_low - shares[experts])

    def _rate(self, layer: int) -> _Urges:
        """Turn the chances of a layer into urges: of a copy, as far as it saves the bytes that it takes."""
        chances = self._chances[layer]
        if not self._low_costs:
            return _Urges(self._waits(chances).tolist(), ())
        low_shares = self._low_shares[layer]
        worths = chances * (1 - low_shares * (1 - self._low_costs[layer]))
        return _Urges(self._waits(worths).tolist(), self._waits(chances * low_shares).tolist())

    def _waits(self, worths: NDArray[np.float64]) -> NDArray[np.float64]:
        return self._stock.layers * (1 / np.maximum(worths, _LEAST_WORTH) - 1)

    def _standing(self, key: Key) -> Standing:
        layer, expert, is_high = self._stock.places[key]
        urges = self._urges[layer] = self._urges[layer] or self._rate(layer)
        if is_high:
            return Standing(0, urges.high[expert])
        is_idle = self._stock.high_keys[layer][expert] in self._residents[layer]
        return Standing(0, _IDLE if is_idle else urges.low[expert])

    def _head_starts(self) -> Sequence[float]:
        layers = self._stock.layers
        return self._distances[layers - self._now - 1 : 2 * layers - self._now - 1]

    def _review_sibling(self, key: Key) -> None:
        """A low copy changes its worth when the high one of its expert comes or goes."""
        layer, expert, is_high = self._stock.places[key]
        if is_high and self._low_costs and self._stock.low_keys[layer][expert] in self._residents[layer]:
            self._unsorted.add(layer)


def _floored(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.maximum(weights, _LEAST_WEIGHT)
    return weights / weights.sum()


def _shares(state: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    array = _array(state, name, shape)
    if not (array <= 1).all():
        raise InvalidInput(f"saved statistics have {name} above 1")
    return array


def _array(state: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    try:
        array = np.array(state[name], dtype=np.float64)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(f"saved statistics have no {name}") from error
    if array.shape != shape or not (np.isfinite(array).all() and (array >= 0).all()):
        raise InvalidInput(f"saved statistics have {name} of shape {array.shape}; this model needs {shape}")
    return array
