"""One request to a record cache: what it still lacks, and what came for it.

It knows keys, leases and failures; not where they come from. Its cache's lock guards it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from undercroft.store.record import Key
from undercroft.store.slab import Lease
from undercroft.store.transfer import Cancelled, Priority


@dataclass(eq=False, slots=True, weakref_slot=True)
class Request:
    """The state of a fetch.

    Attributes:
        priority: of its reads.
        pending: keys that wait for room, in order.
        flying: keys that are being read.
        flying_nbytes: bytes that these occupy.
        ready: what arrived, or why it did not, in that order.
    """

    priority: Priority
    pending: dict[Key, None] = field(default_factory=dict[Key, None])
    flying: set[Key] = field(default_factory=set[Key])
    flying_nbytes: int = 0
    ready: deque[tuple[Key, Lease | Exception]] = field(default_factory=deque[tuple[Key, Lease | Exception]])

    def is_complete(self) -> bool:
        """Whether everything was handed over."""
        return not (self.pending or self.flying or self.ready)

    def expect(self, key: Key, nbytes: int) -> None:
        """A key is being read."""
        self.flying.add(key)
        self.flying_nbytes += nbytes

    def tell(self, key: Key, nbytes: int, outcome: Lease | Exception) -> None:
        """What became of a key that was being read."""
        self.flying.remove(key)
        self.flying_nbytes -= nbytes
        if isinstance(outcome, Cancelled):  # a hint that was cancelled before we asked for it
            self.pending[key] = None
        else:
            self.ready.append((key, outcome))

    def hand_over(self, most: int | None) -> list[tuple[Key, Lease]]:
        """The first of what arrived, at most so many; all where that is None.

        Raises:
            Exception: why a record did not arrive; nothing more is wanted then.
        """
        given: list[tuple[Key, Lease]] = []
        while self.ready and (most is None or len(given) < most):
            key, outcome = self.ready.popleft()
            if isinstance(outcome, Lease):
                given.append((key, outcome))
                continue
            self.forget()
            given.clear()
            try:
                raise outcome
            finally:  # an error that its own frame names would wait for the garbage collector, with all that it holds
                del outcome
        return given

    def forget(self) -> None:
        """Want nothing more, and let go of what arrived: a traceback may keep this object alive."""
        self.pending.clear()
        self.flying.clear()
        self.flying_nbytes = 0
        self.ready.clear()
