"""A record cache on paper: the same shelf and policy as `store.cache.RecordCache`, without a byte.

It knows what a fetch does to residents; not threads, files or time. Invariant: with the same calls it has the same
hits, misses and evictions as the real cache without hints, down to holes in the slab. A fetch is of one
wave (`serving_order.waves`), whose leases are held until all of it is there and then dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue

from undercroft.moe.layered import ExpertPolicy
from undercroft.moe.stock import Stock
from undercroft.store.ranges import BLOCK, FreeRanges, round_up
from undercroft.store.record import Key, Record
from undercroft.store.shelf import Entry, Shelf
from undercroft.store.slab import HUGE_PAGE, Claim, Lease
from undercroft.store.transfer import Chunk


class PaperSlab:
    """Leases of addresses that nothing backs.

    Args:
        capacity: bytes, rounded up as `Slab` does.
        page: bytes that it is rounded up to.
    """

    def __init__(self, capacity: int, *, page: int = HUGE_PAGE) -> None:
        self.capacity = round_up(capacity, page)
        self._ranges = FreeRanges(self.capacity)
        self._returned: SimpleQueue[tuple[int, int]] = SimpleQueue()

    @property
    def leased(self) -> int:
        """Bytes in live leases."""
        self._collect()
        return self.capacity - self._ranges.free

    @property
    def committed(self) -> int:
        """None: it is of paper."""
        return 0

    def lease(self, nbytes: int) -> Lease | None:
        """Room for `nbytes`, or None where there is none in one piece."""
        self._collect()
        offset = self._ranges.take(nbytes)
        if offset is None:
            return None
        length = round_up(nbytes)
        return Lease(Claim(offset, length, None, partial(self._returned.put, (offset, length))))

    def trim(self) -> int:
        """Nothing to give back."""
        return 0

    def close(self) -> None:
        """Nothing to close."""

    def _collect(self) -> None:
        while not self._returned.empty():
            self._ranges.give(*self._returned.get())


class PaperSource:
    """Records that are not on any disk; a `store.records.RecordSource`."""

    def __init__(self, stock: Stock) -> None:
        self.path = Path()
        self._records = {key: _record(key, stock.occupied(key)) for key in stock.places}

    def __getitem__(self, key: tuple[str, str], /) -> Record:
        return self._records[Key(*key)]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._records)

    def chunks(self, pieces: Sequence[tuple[Record, int]]) -> list[Chunk]:
        """Nothing to read."""
        return []

    def settle(self, record: Record, address: int, *, moved: bool) -> None:
        """Nothing to check."""


class PaperCache:
    """What `RecordCache` does to its shelf.

    Args:
        stock: the records.
        budget: the most bytes that they may take.
        policy: which leaves first.
        page: bytes that the slab is rounded up to; None for what the engine takes at this budget.
    """

    def __init__(self, stock: Stock, budget: int, policy: ExpertPolicy, *, page: int | None = None) -> None:
        self._source = PaperSource(stock)
        self._policy = policy
        size = page or (HUGE_PAGE if budget >= 64 * HUGE_PAGE else BLOCK)
        self._shelf = Shelf(budget, PaperSlab(budget, page=size), policy, _forget)

    @property
    def held(self) -> int:
        """Bytes that records take now."""
        return self._shelf.held

    def __contains__(self, key: Key) -> bool:
        return key in self._shelf.entries

    def fetch(self, keys: Sequence[Key]) -> list[Key]:
        """Ask for records, wait until all are there, and drop them.

        Returns:
            Those that were not there before.

        Raises:
            BudgetExceeded, TierFull: they find no room together.
        """
        leases: list[Lease] = []
        missing: list[Key] = []
        for key in keys:
            self._policy.touch(key)
            entry = self._shelf.entries.get(key)
            if entry is None:
                missing.append(key)
            else:
                leases.append(self._shelf.pin(entry))
        for entry in [self._admit(key) for key in missing]:
            self._shelf.land(entry)
        leases.clear()
        self._shelf.collect()
        return missing

    def _admit(self, key: Key) -> Entry:
        record = self._source[key]
        entry = self._shelf.admit(record, self._source, spare=_anything)
        if entry is None:
            raise self._shelf.no_room(record)
        return entry


def _record(key: Key, nbytes: int) -> Record:
    return Record(
        name=key.name,
        kind=key.kind,
        offset=0,
        nbytes=nbytes,
        dtype="uint8",
        shape=(nbytes,),
        checksum=0,
        metadata={},
    )


def _anything(entry: Entry) -> bool:
    return True


def _forget(entry: Entry) -> None:
    pass
