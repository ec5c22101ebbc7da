"""Bytes per tier, and who holds them.

Pure arithmetic: a `Budget` knows numbers and names, no memory. Invariant: what is held in a tier never exceeds
its limit, whatever the threads do; a reservation is returned at most once.

A reservation may be released by a destructor, which Python may run in the middle of any other call of this module
on the same thread. A lock cannot be taken there. So `release` only puts the bytes into a `SimpleQueue`, whose `put`
is documented as re-entrant, and the next call that looks at the books collects them under the lock.
"""

from __future__ import annotations

import threading
from collections import Counter
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Literal, Self

from undercroft.errors import BudgetExceeded, InvalidInput
from undercroft.units import parse_size

Tier = Literal["device", "host", "disk"]


class Reservation:
    """Bytes of a tier held by someone until `release`, which may be called from anywhere, any number of times."""

    __slots__ = ("_returned", "holder", "nbytes", "tier")

    def __init__(self, tier: Tier, nbytes: int, holder: str, returned: SimpleQueue[Reservation]) -> None:
        self.tier = tier
        self.nbytes = nbytes
        self.holder = holder
        self._returned: SimpleQueue[Reservation] | None = returned

    def release(self) -> None:
        """Return the bytes."""
        returned, self._returned = self._returned, None
        if returned is not None:
            returned.put(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


class Budget:
    """Byte limits per tier.

    Args:
        limits: tier name → limit, as bytes or text: ``Budget(host="8GiB")``. A tier without a limit is unbounded, but
            its bytes are counted all the same.

    Raises:
        InvalidInput: a tier or a size that does not exist.
    """

    def __init__(self, **limits: int | str) -> None:
        unknown = limits.keys() - {"device", "host", "disk"}
        if unknown:
            raise InvalidInput(f"no tier is called {sorted(unknown)[0]!r}; there are device, host and disk")
        self._limits = {tier: parse_size(limit) for tier, limit in limits.items()}
        self._lock = threading.Lock()
        self._returned: SimpleQueue[Reservation] = SimpleQueue()
        self._held: Counter[str] = Counter()
        self._peak: Counter[str] = Counter()
        self._holders: dict[str, Counter[str]] = {"device": Counter(), "host": Counter(), "disk": Counter()}

    def limit(self, tier: Tier) -> int | None:
        """Bytes allowed in a tier, None where it is unbounded."""
        return self._limits.get(tier)

    def held(self, tier: Tier) -> int:
        """Bytes held in a tier now."""
        with self._lock:
            self._collect()
            return self._held[tier]

    def peak(self, tier: Tier) -> int:
        """The most bytes ever held in a tier at once since the last `forget_peak`."""
        with self._lock:
            return self._peak[tier]

    def forget_peak(self) -> None:
        """Begin a new peak at what is held now."""
        with self._lock:
            self._collect()
            self._peak = Counter(self._held)

    def holders(self, tier: Tier) -> dict[str, int]:
        """Bytes held in a tier by each holder that holds any."""
        with self._lock:
            self._collect()
            return {name: nbytes for name, nbytes in self._holders[tier].items() if nbytes}

    def can_reserve(self, tier: Tier, nbytes: int) -> bool:
        """Whether `nbytes` would fit at this moment."""
        with self._lock:
            self._collect()
            return self._fits(tier, nbytes)

    def try_reserve(self, tier: Tier, nbytes: int, holder: str) -> Reservation | None:
        """Hold `nbytes` of a tier if they fit, else None."""
        with self._lock:
            self._collect()
            if not self._fits(tier, nbytes):
                return None
            self._held[tier] += nbytes
            self._holders[tier][holder] += nbytes
            self._peak[tier] = max(self._peak[tier], self._held[tier])
        return Reservation(tier, nbytes, holder, self._returned)

    def reserve(self, tier: Tier, nbytes: int, holder: str) -> Reservation:
        """Hold `nbytes` of a tier.

        Raises:
            BudgetExceeded: they do not fit; the text says who holds what.
        """
        reservation = self.try_reserve(tier, nbytes, holder)
        if reservation is None:
            raise BudgetExceeded(nbytes, self._limits[tier], self.holders(tier), tier=tier)
        return reservation

    def _fits(self, tier: Tier, nbytes: int) -> bool:
        limit = self._limits.get(tier)
        return limit is None or self._held[tier] + nbytes <= limit

    def _collect(self) -> None:
        while True:
            try:
                back = self._returned.get_nowait()
            except Empty:
                return
            self._held[back.tier] -= back.nbytes
            self._holders[back.tier][back.holder] -= back.nbytes
