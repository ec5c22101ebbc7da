"""Which expert leaves memory first, where some are on a device above it too.

It knows policies and who is above; not bytes or devices. What is on the device is not asked of memory, and two policies
that rank alike would hold the same experts twice. So those leave first that the device will not give up soon: all that
it has but for the next to leave, as many as two tokens use. The others must stay, for what leaves the device is mostly
wanted again, and would be read from the disk. Invariants: those of `EvictionPolicy`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

from undercroft.moe.layered import ExpertPolicy, Wanted
from undercroft.moe.stock import Stock
from undercroft.store.record import Key

_PASSING = 2
"""Tokens whose experts may push others off the device before memory is told again."""
_PERIOD = 16
"""Forwards after which it is."""


class Above(Protocol):
    """What holds experts on a device."""

    @property
    def policy(self) -> ExpertPolicy:
        """Which leave it first."""
        ...

    def __contains__(self, key: Key) -> bool: ...


class Beneath:
    """A policy for memory beneath a device; an `ExpertPolicy`.

    Args:
        policy: which leave first of those that are not above.
        above: what holds experts on the device.
        stock: which experts there are.
    """

    def __init__(self, policy: ExpertPolicy, above: Above, stock: Stock) -> None:
        self._policy, self._above, self._stock = policy, above, stock
        self._here: set[Key] = set()
        self._doubled: deque[Key] = deque()
        self._age = _PERIOD
        self.begin, self.chance = policy.begin, policy.chance
        self.touch, self.state, self.restore = policy.touch, policy.state, policy.restore

    def turn_to(self, layer: int, wanted: Sequence[Wanted] = (), tokens: int = 1) -> None:
        """See `ExpertPolicy`."""
        self._age += layer == 0
        self._policy.turn_to(layer, wanted, tokens)

    def insert(self, key: Key) -> None:
        """See `EvictionPolicy`."""
        self._here.add(key)
        self._policy.insert(key)

    def remove(self, key: Key) -> None:
        """See `EvictionPolicy`."""
        self._here.discard(key)
        self._policy.remove(key)

    def victims(self) -> Iterator[Key]:
        """See `EvictionPolicy`."""
        if self._age >= _PERIOD:
            self._doubled, self._age = deque(self._settled()), 0
        while self._doubled and not self._is_double(self._doubled[0]):
            self._doubled.popleft()
        given: set[Key] = set()
        for key in filter(self._is_double, self._doubled):
            given.add(key)
            yield key
        for key in self._policy.victims():
            if key not in given:
                yield key

    def _is_double(self, key: Key) -> bool:
        return key in self._here and key in self._above

    def _settled(self) -> list[Key]:
        """What the device will not give up soon, the surest first."""
        passing = _PASSING * self._stock.used * sum(self._stock.high_nbytes)
        settled: list[Key] = []
        for key in self._above.policy.victims():
            if passing > 0:
                passing -= self._stock.occupied(key)
            else:
                settled.append(key)
        return settled[::-1]
