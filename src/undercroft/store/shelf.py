"""What a record cache holds: entries, the room they take, who uses them, which leaves first.

It knows bytes, pins and a policy; not files' content, queues or who waits. Its owner's lock guards every
call but the death of a pin, which may happen anywhere. Invariants: `held` never exceeds `budget`; an entry
that is being read or is in use never leaves.
"""

from __future__ import annotations

import errno
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Protocol

from undercroft.errors import BudgetExceeded, TierFull
from undercroft.store.policy import EvictionPolicy
from undercroft.store.record import Key, Record
from undercroft.store.records import RecordSource
from undercroft.store.request import Request
from undercroft.store.slab import Lease, Lender
from undercroft.store.transfer import Transfer
from undercroft.units import format_size


@dataclass(slots=True, eq=False)
class Entry:
    """A record that takes room.

    Attributes:
        record: which.
        file: where from.
        lease: the room; None once it left, so that whoever still has the entry does not hold the bytes.
        key: the record's.
        nbytes: of the room.
        address: where the room starts.
        transfer: what brings the bytes; None once they are here.
        pins: how many uses of the bytes are under way.
        loading: whether the bytes are still to come.
        foreseen: it was read on a hint, and nobody has asked for it yet.
        waiters: weak references to those who asked for it while it was on its way.
    """

    record: Record
    file: RecordSource
    lease: Lease | None
    key: Key
    nbytes: int
    address: int
    pins: int = 0
    transfer: Transfer | None = None
    loading: bool = True
    foreseen: bool = False
    waiters: list[weakref.ref[Request]] = field(default_factory=list[weakref.ref[Request]])


class Hold:
    """Several entries in use, until this object dies: one pin for all of them.

    Attributes:
        leases: of their rooms, in the order in which they were asked for. They are the entries' own: no view made of
            one may live longer than this object.
    """

    __slots__ = ("_on_end", "leases")

    def __init__(self, leases: Sequence[Lease], on_end: Callable[[], None]) -> None:
        self.leases, self._on_end = leases, on_end

    def __del__(self) -> None:
        self._on_end()


Spare = Callable[[Entry], bool]


class Arena(Lender, Protocol):
    """A lender of one space of so many bytes: a slab, or one on paper.

    Attributes:
        capacity: of the space.
    """

    capacity: int

    @property
    def committed(self) -> int:
        """Bytes that occupy RAM."""
        ...


class Shelf:
    """Entries by key, under a budget of bytes.

    Attributes:
        budget: the most bytes that entries may take.
        entries: by key.
        held: bytes that they take.
        idle: those of them that could leave: whose bytes are here, and not in use.
        loading: entries whose bytes are on their way, in the order of their reads.
        hints: those of them that nobody asked for, in that order too.
        on_leave: told of the key of each entry that leaves.

    Args:
        budget: the most bytes that entries may take.
        slab: where their room comes from; others may use it too.
        policy: which entry leaves first.
        on_evict: told of each entry that left to make room.
    """

    def __init__(
        self, budget: int, slab: Arena, policy: EvictionPolicy[Key], on_evict: Callable[[Entry], None]
    ) -> None:
        self.budget = budget
        self.held = self.idle = 0
        self.loading: dict[Entry, None] = {}
        self.hints: dict[Entry, None] = {}
        self.entries: dict[Key, Entry] = {}
        self.on_leave: Callable[[Key], None] = _nobody
        self._still = 0
        self._stirred: SimpleQueue[None] = SimpleQueue()
        self._slab, self._policy, self._on_evict = slab, policy, on_evict
        self._unpinned: SimpleQueue[Sequence[Entry]] = SimpleQueue()

    @property
    def room(self) -> int:
        """Bytes that are free or could be freed now, though perhaps not in one piece."""
        return self.budget - self.held + self.idle

    @property
    def pinned(self) -> int:
        """Bytes of entries in use."""
        return sum(entry.nbytes for entry in self.entries.values() if entry.pins)

    @property
    def resting(self) -> list[Entry]:
        """Entries whose bytes are here."""
        return [entry for entry in self.entries.values() if not entry.loading]

    def admit(self, record: Record, file: RecordSource, *, spare: Spare) -> Entry | None:
        """Make room for a record; None where there is not enough.

        Args:
            record: what wants in; it is not here yet.
            file: where it comes from.
            spare: which of the entries that could leave may do so for this record.
        """
        nbytes = record.occupied
        if nbytes > self.room or (lease := self._room(nbytes, spare)) is None:
            return None
        key = record.key
        entry = Entry(record, file, lease, key, nbytes, lease.address)
        self.entries[key] = entry
        self.loading[entry] = None
        self.held += nbytes
        self._policy.insert(key)
        return entry

    def land(self, entry: Entry) -> None:
        """The entry's bytes are here."""
        entry.transfer = None
        entry.loading = False
        self._forget_read(entry)
        self.idle += entry.nbytes

    def remove(self, entry: Entry) -> None:
        """Give the entry's room back; what is in use of it stays where it is until the last use ends."""
        if entry.loading:
            self._forget_read(entry)
        elif not entry.pins:
            self.idle -= entry.nbytes
        self.held -= entry.nbytes
        del self.entries[entry.key]
        entry.lease = entry.transfer = None
        self._policy.remove(entry.key)
        self.on_leave(entry.key)

    def pin(self, entry: Entry) -> Lease:
        """A lease of the entry's bytes; while it or a view of it lives, the entry stays."""
        return self._use(entry).pin(partial(self._unpinned.put, (entry,)))

    def hold(self, entries: Sequence[Entry]) -> Hold:
        """A use of several entries, which ends for all together."""
        return Hold([self._use(entry) for entry in entries], partial(self._unpinned.put, entries))

    def still(self) -> Hold:
        """A use of all entries that there are, without asking for any: until it ends, none leaves."""
        self._still += 1
        return Hold((), partial(self._stirred.put, None))

    @property
    def is_still(self) -> bool:
        """Whether there is such a use."""
        self.collect()
        return self._still > 0

    def collect(self) -> None:
        """Take note of the uses that ended; what there is no room for any more leaves."""
        while not self._unpinned.empty():
            for entry in self._unpinned.get():
                self._unpin(entry)
        while not self._stirred.empty():
            self._stirred.get()
            self._still -= 1
            if self.held > self.budget and not self._still:  # which has become smaller
                self.resize(self.budget)

    def resize(self, budget: int) -> None:
        """Set the budget; as many entries leave as it has no room for, and with them the memory that they took."""
        self.budget = budget
        while self.held > budget or self._takes_more(budget):
            victim = next(self._victims(anything), None)
            if victim is None:
                break
            self._evict(victim)
        self._slab.trim()

    def superfluous(self, nbytes: int) -> list[Entry]:
        """Reads under way that nobody asked for, the latest first, as many as make room of `nbytes`."""
        wanted = {id(entry.transfer) for entry in self.loading if entry not in self.hints}
        found: list[Entry] = []
        for entry in reversed(self.hints):
            if nbytes > 0 and id(entry.transfer) not in wanted:
                found.append(entry)
                nbytes -= entry.nbytes
        return found

    def no_room(self, record: Record) -> BudgetExceeded | TierFull:
        """The error that says why `admit` has no room for a record."""
        pinned, need = self.pinned, record.occupied
        if self.held + need > self.budget:
            holders = {"records in use": pinned, "other records": self.held - pinned}
            hint = "Drop leases before asking for more, or give the cache a larger budget."
            return BudgetExceeded(need, self.budget, holders, hint=hint)
        return TierFull(
            f"record {tuple(record.key)} needs {format_size(need)} in one piece; the slab of "
            f"{format_size(self._slab.capacity)}, of which {format_size(self._slab.leased)} are leased, "
            "has none; make it larger",
            errno=errno.ENOMEM,
        )

    def _use(self, entry: Entry) -> Lease:
        assert entry.lease is not None
        if not entry.pins:
            self.idle -= entry.nbytes
        entry.pins += 1
        return entry.lease

    def _unpin(self, entry: Entry) -> None:
        entry.pins -= 1
        if not entry.pins and entry.lease is not None:
            self.idle += entry.nbytes
            if self.held > self.budget and not self._still:  # which has become smaller
                self._evict(entry)
                self._slab.trim()

    def _forget_read(self, entry: Entry) -> None:
        self.loading.pop(entry, None)
        self.hints.pop(entry, None)

    def _room(self, nbytes: int, spare: Spare) -> Lease | None:
        leaving = self._leaving(self.held + nbytes - self.budget, spare)
        if leaving is None:
            return None
        lease: Lease | None = None
        for entry in leaving:
            if entry.nbytes == nbytes:
                lease = entry.lease
            self._evict(entry)
        return lease or self._lease(nbytes, spare)

    def _lease(self, nbytes: int, spare: Spare) -> Lease | None:
        while (lease := self._slab.lease(nbytes)) is None:  # room, but not in one piece
            victim = next(self._victims(spare), None)
            if victim is None:
                return self._slab.lease(nbytes) if self._slab.trim() else None
            self._evict(victim)
        return lease

    def _takes_more(self, nbytes: int) -> bool:
        """Whether the slab occupies more RAM than that even without what no entry touches."""
        return self._slab.committed > nbytes and self._slab.committed - self._slab.trim() > nbytes

    def _leaving(self, short: int, spare: Spare) -> list[Entry] | None:
        """The entries to evict for `short` bytes, or None where all that may leave are not enough."""
        leaving: list[Entry] = []
        victims = self._victims(spare)
        while short > 0:
            victim = next(victims, None)
            if victim is None:
                return None
            leaving.append(victim)
            short -= victim.nbytes
        return leaving

    def _victims(self, spare: Spare) -> Iterator[Entry]:
        for key in () if self._still else self._policy.victims():
            entry = self.entries[key]
            if not entry.loading and not entry.pins and spare(entry):
                yield entry

    def _evict(self, entry: Entry) -> None:
        self.remove(entry)
        self._on_evict(entry)


def _nobody(_: Key) -> None:
    """Needs to be told of nothing."""


def anything(_: Entry) -> bool:
    """Every entry may leave."""
    return True
