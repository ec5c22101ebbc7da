"""The frame of eviction policies that know about layers: a queue for each layer, merged when room is needed.

It knows stock, residents and queues; what a resident is worth is its subclasses' to say. Between two services of a
layer nothing in it changes worth relative to the rest of it, so a layer is sorted once a service and the next
victim is the most urgent of the layers' heads: nothing is sorted for an eviction. Invariants: those of
`EvictionPolicy`; equal calls give equal orders.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from heapq import heapify, heappop, heapreplace
from typing import Any, NamedTuple, Protocol

from undercroft.moe.stock import Stock
from undercroft.store.policy import EvictionPolicy
from undercroft.store.record import Key


class Wanted(NamedTuple):
    """An expert that a forward wants of a layer.

    Attributes:
        expert: which.
        tokens: how many of the forward's tokens are routed to it.
        is_high: whether its high copy is what they deserve; what serves them depends on what is in memory, too.
    """

    expert: int
    tokens: int = 1
    is_high: bool = True


class ExpertPolicy(EvictionPolicy[Key], Protocol):
    """An eviction policy that is told what the model does."""

    def begin(self) -> None:
        """A new sequence starts."""
        ...

    def turn_to(self, layer: int, wanted: Sequence[Wanted] = (), tokens: int = 1) -> None:
        """A layer is served now. A forward serves 0, 1, ... in order; the touches of its experts follow.

        Args:
            layer: which.
            wanted: all experts that the forward wants of it.
            tokens: of the forward: 1 in decoding. A prefill wants nearly all experts once, so it is by the share of its
                tokens, not by being touched, that an expert of a prefill is worth keeping.
        """
        ...

    def chance(self, layer: int, expert: int) -> float:
        """The chance that a token wants an expert, 0 to 1, as far as it knows; 0 where it does not."""
        ...

    def state(self) -> dict[str, Any]:
        """What it has learned, as JSON can hold it; not what is in memory."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what another of the same stock had learned.

        Raises:
            InvalidInput: it is no such state, or of another stock.
        """
        ...


class Heedless:
    """What a policy does about that which it does not heed: nothing."""

    def begin(self) -> None:
        """See `ExpertPolicy`."""

    def turn_to(self, layer: int, wanted: Sequence[Wanted] = (), tokens: int = 1) -> None:
        """See `ExpertPolicy`."""

    def touch(self, key: Key) -> None:
        """See `EvictionPolicy`."""

    def chance(self, layer: int, expert: int) -> float:
        """See `ExpertPolicy`."""
        return 0.0

    def state(self) -> dict[str, Any]:
        """See `ExpertPolicy`."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `ExpertPolicy`."""


class Standing(NamedTuple):
    """How soon a resident should leave.

    Attributes:
        group: of its layer: residents whose order among one another is the same whatever layer is served.
        urge: the larger, the sooner; comparable among all residents once the group's head start is added.
    """

    group: int
    urge: float


Queue = list[tuple[float, Key]]


class Layered(Heedless, ABC):
    """Residents by layer, each layer a few sorted queues.

    Args:
        stock: which experts there are.
    """

    groups = 1

    def __init__(self, stock: Stock) -> None:
        self._stock = stock
        self._now = 0
        self._residents: list[dict[Key, Standing]] = [{} for _ in range(stock.layers)]
        self._queues: list[Queue] = [[] for _ in range(stock.layers * self.groups)]
        self._unsorted: set[int] = set()

    @abstractmethod
    def _standing(self, key: Key) -> Standing:
        """Where a resident stands until its layer is served again."""

    @abstractmethod
    def _head_starts(self) -> Sequence[float]:
        """What layer `_now` adds to the urge of each group: those of layer 0, then those of layer 1, and so on."""

    @abstractmethod
    def _learn(self, layer: int, wanted: Sequence[Wanted], tokens: int) -> None:
        """Take note of what a forward wants; `_now` is still the layer before."""

    def turn_to(self, layer: int, wanted: Sequence[Wanted] = (), tokens: int = 1) -> None:
        """See `ExpertPolicy`."""
        self._learn(layer, wanted, tokens)
        self._now = layer
        self._unsorted.add(layer)

    def insert(self, key: Key) -> None:
        """See `EvictionPolicy`."""
        layer = self._stock.places[key].layer
        standing = self._residents[layer][key] = self._standing(key)
        if layer not in self._unsorted:
            insort(self._queue(layer, standing), (-standing.urge, key))

    def remove(self, key: Key) -> None:
        """See `EvictionPolicy`."""
        layer = self._stock.places[key].layer
        standing = self._residents[layer].pop(key)
        if layer not in self._unsorted:
            queue = self._queue(layer, standing)
            del queue[bisect_left(queue, (-standing.urge, key))]

    def victims(self) -> Iterator[Key]:
        """See `EvictionPolicy`."""
        self._sort()
        starts = self._head_starts()
        heap = [
            (queue[0][0] - starts[number], number, 0) for number, queue in enumerate(self._queues) if queue
        ]
        heapify(heap)
        while heap:
            _, number, place = heap[0]
            queue = self._queues[number]
            yield queue[place][1]
            if (after := place + 1) < len(queue):
                heapreplace(heap, (queue[after][0] - starts[number], number, after))
            else:
                heappop(heap)

    def _queue(self, layer: int, standing: Standing) -> Queue:
        return self._queues[layer * self.groups + standing.group]

    def _sort(self) -> None:
        for layer in self._unsorted:
            residents = self._residents[layer]
            first = layer * self.groups
            queues: list[Queue] = [[] for _ in range(self.groups)]
            for key in residents:
                standing = residents[key] = self._standing(key)
                queues[standing.group].append((-standing.urge, key))
            for queue in queues:
                queue.sort()
            self._queues[first : first + self.groups] = queues
        self._unsorted.clear()
