"""Which record leaves first when room is needed.

Pure: a policy sees keys and touches, never bytes, tensors, files or clocks, so the same object runs in a
cache and in a simulation. The cache decides how much must leave and what is in use; the policy only puts
keys in order. Invariants: `victims` gives each key between its `insert` and its `remove` exactly once;
equal calls give equal orders.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Protocol, TypeVar

Key = TypeVar("Key", bound=Hashable)


class EvictionPolicy(Protocol[Key]):
    """An order among the keys that occupy room."""

    def touch(self, key: Key) -> None:
        """A key was asked for, whether or not it occupies room."""
        ...

    def insert(self, key: Key) -> None:
        """A key occupies room from now on; its read may only just have begun."""
        ...

    def remove(self, key: Key) -> None:
        """A key that was inserted occupies room no longer."""
        ...

    def victims(self) -> Iterator[Key]:
        """Every key that occupies room, the one to evict first first; void after any other call."""
        ...


class Lru(EvictionPolicy[Key]):
    """Least recently used first; an insert counts as a use."""

    def __init__(self) -> None:
        self._order: dict[Key, None] = {}

    def touch(self, key: Key) -> None:
        """See `EvictionPolicy`."""
        if key in self._order:
            del self._order[key]
            self._order[key] = None

    def insert(self, key: Key) -> None:
        """See `EvictionPolicy`."""
        self._order[key] = None

    def remove(self, key: Key) -> None:
        """See `EvictionPolicy`."""
        del self._order[key]

    def victims(self) -> Iterator[Key]:
        """See `EvictionPolicy`."""
        return iter(self._order)


class Lfu(EvictionPolicy[Key]):
    """Least often touched first, and among equals the one that has been so for longest.

    Touches are remembered after a key has left, so that one evicted by a burst of others is not a stranger
    when it returns. The memory for it is one number per key ever touched.
    """

    def __init__(self) -> None:
        self._touches: dict[Key, int] = {}
        self._levels: dict[int, dict[Key, None]] = {}

    def touch(self, key: Key) -> None:
        """See `EvictionPolicy`."""
        touches = self._touches.get(key, 0)
        self._touches[key] = touches + 1
        if key in self._levels.get(touches, ()):
            self._leave(touches, key)
            self._enter(touches + 1, key)

    def insert(self, key: Key) -> None:
        """See `EvictionPolicy`."""
        self._enter(self._touches.get(key, 0), key)

    def remove(self, key: Key) -> None:
        """See `EvictionPolicy`."""
        self._leave(self._touches.get(key, 0), key)

    def victims(self) -> Iterator[Key]:
        """See `EvictionPolicy`."""
        for touches in sorted(self._levels):
            yield from self._levels[touches]

    def _enter(self, touches: int, key: Key) -> None:
        self._levels.setdefault(touches, {})[key] = None

    def _leave(self, touches: int, key: Key) -> None:
        level = self._levels[touches]
        del level[key]
        if not level:
            del self._levels[touches]
