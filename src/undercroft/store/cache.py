"""A cache of records: read-only weights in memory under a byte budget.

It knows who asked for which records, and what is on its way to whom; not what they mean. A `Shelf` holds
them, an `EvictionPolicy` says what leaves first, a `TransferQueue` moves bytes. Invariants: all records in
memory and on their way never take more than the budget; a record in use never leaves; a lease that is
handed out holds the bytes that were written, or an error is raised in its place.

One lock guards everything. A lease dies whenever Python drops its last view, perhaps in the middle of our
own code, so its death only fills a queue that the next call empties (see `budget.py`). An iterator may be
dropped as suddenly, so entries know it only by a weak reference. The lock is not held while a transfer is
submitted, which may wait for workers that are waiting for us, nor while a checksum is computed.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import Self

from undercroft.errors import InvalidInput, SpillMisuse
from undercroft.events import Recorder
from undercroft.store.arrivals import Arrivals
from undercroft.store.loading import Arrival, Loader
from undercroft.store.policy import EvictionPolicy, Lru
from undercroft.store.record import Key, Record
from undercroft.store.records import RecordSource, homes
from undercroft.store.request import Request
from undercroft.store.shelf import Entry, Hold, Shelf, Spare, anything
from undercroft.store.slab import Lease, Slab
from undercroft.store.transfer import CHUNK, Cancelled, Priority, Transfer, TransferQueue, check_process
from undercroft.units import parse_size

_POLL_SECONDS = 0.005
_PLENTY = 2 * CHUNK


class RecordCache:
    """Records by (name, kind), read when they are asked for and kept while there is room.

    Args:
        files: where the records are; a key must not occur twice. They stay the caller's to close.
        budget: the most bytes that records may take, those on their way and those in use included.
        slab: where they go; it reserves RAM in its own `Budget`. Best is one of the same size, not shared.
        queue: what moves them.
        policy: which record leaves first; `Lru` if None.
        patience: seconds that a fetch waits for leases to be dropped, where those in use leave it no room.
        recorder: counts hits (in memory), waits (on their way), misses, read_bytes, evictions, foreseen,
            useless_prefetches (gone, or recanted, before anybody asked) and cancelled_prefetches; and the bytes of
            records whose reads were begun on a hint (foreseen_bytes), asked for then (useful_bytes), or stopped
            (cancelled_bytes).

    Raises:
        InvalidInput: a budget that is no size, or a key that two files have.
    """

    def __init__(
        self,
        files: Sequence[RecordSource],
        budget: int | str,
        slab: Slab,
        queue: TransferQueue,
        *,
        policy: EvictionPolicy[Key] | None = None,
        patience: float = 10.0,
        recorder: Recorder | None = None,
    ) -> None:
        self._homes = homes(files)
        self._patience = patience
        self._policy: EvictionPolicy[Key] = policy or Lru()
        self._recorder = recorder or Recorder(enabled=False)
        self._loader = Loader(queue, self._arrived)
        self._shelf = Shelf(parse_size(budget), slab, self._policy, self._evicted)
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._closed = False
        self._process = os.getpid()

    @property
    def budget(self) -> int:
        """The most bytes that records may take."""
        return self._shelf.budget

    @property
    def held(self) -> int:
        """Bytes that records take now."""
        with self._lock:
            self._shelf.collect()
            return self._shelf.held

    @property
    def pinned(self) -> int:
        """Bytes of records in use now."""
        with self._lock:
            self._shelf.collect()
            return self._shelf.pinned

    def record(self, key: tuple[str, str]) -> Record:
        """What the index says of a record; its `tensor` gives a lease a shape.

        Raises:
            InvalidInput: no file has it.
        """
        return self._home(key)[key]

    def __contains__(self, key: tuple[str, str]) -> bool:
        """Whether a record is in memory, so that a fetch would not wait for it."""
        with self._lock:
            entry = self._shelf.entries.get(Key(*key))
            return entry is not None and not entry.loading

    def fetch(self, keys: Iterable[tuple[str, str]], *, priority: Priority = Priority.DEMAND) -> Arrivals:
        """Ask for records; they come as they arrive, those in memory first, each once.

        Reads begin now, in the order of the keys, for as many as there is room for, and for more as leases
        are dropped. A record stays while its lease, or any view of that, lives. A loop holds one lease while
        it waits for the next, unless it deletes its variable, so room for two is the least to go on.

        Raises:
            InvalidInput: no file has one of them.
            SpillMisuse: the cache or its queue is closed, or belongs to the process this one was forked from.
            BudgetExceeded: (from the iterator) leases in use left no room for `patience` seconds.
            TierFull: (from the iterator) the same, but it is the slab that has no room in one piece.
            CorruptRecord, TransferFailed: (from the iterator) a record could not be read, in two reads.
        """
        check_process(self._process)
        wanted = self._wanted(keys)
        request = Request(priority)
        with self._lock:
            self._check_open()
            for key in wanted:
                self._ask(request, key)
            for name, those in (
                ("hits", request.ready),
                ("waits", request.flying),
                ("misses", request.pending),
            ):
                if those:
                    self._recorder.count(name, len(those))
            transfers = self._begin(request)
        if transfers:
            self._loader.submit(transfers, priority)
        return Arrivals(partial(self._take, request))

    def hold(self, keys: Sequence[Key]) -> Hold | None:
        """Use records together that are all in memory: a `fetch` that waits for nothing, with one pin for all.

        Args:
            keys: different ones.

        Returns:
            None where one is not there, as if nothing had been asked.

        Raises:
            SpillMisuse: the cache is closed, or belongs to the process this one was forked from.
        """
        check_process(self._process)
        with self._lock:
            self._check_open()
            found: list[Entry] = []
            for key in keys:
                entry = self._shelf.entries.get(key)
                if entry is None or entry.loading:
                    return None
                found.append(entry)
            for entry in found:
                self._policy.touch(entry.key)
                self._not_foreseen(entry)
            self._recorder.count("hits", len(found))
            return self._shelf.hold(found)

    def touch(self, keys: Sequence[Key]) -> None:
        """Count as hits what was used without being asked for, see `still`."""
        with self._lock:
            for key in keys:
                self._policy.touch(key)
            self._recorder.count("hits", len(keys))

    def still(self) -> Hold:
        """Use whatever is here, without asking for it: until that ends, no record leaves.

        Meanwhile a fetch that needs room waits, and a hint finds none.

        Raises:
            SpillMisuse: the cache is closed.
        """
        with self._lock:
            self._check_open()
            return self._shelf.still()

    def tell_of_leaving(self, told: Callable[[Key], None]) -> None:
        """Let `told` know of every record that leaves from now on, in the middle of other calls of this object."""
        with self._lock:
            self._shelf.on_leave = told

    def foresee(
        self, keys: Iterable[tuple[str, str]], *, may_leave: Callable[[Key], bool] = lambda key: True
    ) -> list[Key]:
        """Hint that records will be asked for. They are read behind all demands, as far as there is room.

        Room is what is free, and records that nobody uses and that were not foreseen; a fetch that finds no other
        room takes it back.

        Args:
            keys: the likeliest first.
            may_leave: which of those records may leave for them.

        Returns:
            Those whose reads begin now.

        Raises:
            InvalidInput: no file has one of them.
            SpillMisuse: the cache is closed, or belongs to the process this one was forked from.
        """
        check_process(self._process)
        wanted = self._wanted(keys)
        protected = set(wanted)
        with self._lock:
            self._check_open()
            absent = [key for key in wanted if key not in self._shelf.entries]
            begun: list[Entry] = []
            for key in absent:
                entry = self._admit(
                    key, lambda each: _unforeseen(each) and each.key not in protected and may_leave(each.key)
                )
                if entry is None:
                    break
                entry.foreseen = True
                self._shelf.hints[entry] = None
                begun.append(entry)
            self._recorder.count("foreseen", len(begun))
            self._recorder.count("foreseen_bytes", sum(entry.nbytes for entry in begun))
            transfers = self._loader.prepare(begun)
        self._loader.submit(transfers, Priority.PREFETCH)
        return [entry.key for entry in begun]

    def recant(self, keys: Iterable[tuple[str, str]]) -> None:
        """Take hints back. What is not read yet of records that nobody asked for is not read; the rest may leave."""
        with self._lock:
            found = [self._shelf.entries.get(Key(*key)) for key in keys]
            recanted = {entry: None for entry in found if entry is not None and entry.foreseen}
            shared = {id(entry.transfer) for entry in self._shelf.loading if entry not in recanted}
            for entry in recanted:
                entry.foreseen = False
                self._recorder.count("useless_prefetches", not entry.loading)
                if id(entry.transfer) not in shared:
                    self._loader.cancel(entry)

    def resize(self, budget: int, timeout: float = 30.0) -> None:
        """Allow records so many bytes from now on; those it has no room for leave, and their memory is given back.

        Reads under way are waited for, and cancelled if nobody asked for them. Records in use stay until their leases
        die, and no record comes meanwhile that there is no room for.

        Args:
            budget: bytes.
            timeout: seconds to wait for reads.

        Raises:
            SpillMisuse: the cache is closed.
        """
        with self._lock:
            self._check_open()
            if budget < self._shelf.budget:
                for entry in self._shelf.hints:
                    self._loader.cancel(entry)
                under_way = list(self._shelf.loading)
                self._changed.wait_for(lambda: self._shelf.loading.keys().isdisjoint(under_way), timeout)
            self._shelf.resize(budget)

    def close(self, timeout: float = 30.0) -> None:
        """Return every byte but those of leases in use, which return when they die; again is allowed.

        Reads under way are cancelled; one that does not come back within `timeout` seconds keeps its room,
        for the system may still write there. A fetch that waits on another thread raises `SpillMisuse`.
        """
        if os.getpid() != self._process:
            return
        with self._lock:
            self._closed = True
            self._changed.notify_all()
            for entry in self._shelf.loading:
                self._loader.cancel(entry)
            self._changed.wait_for(lambda: not self._shelf.loading, timeout)
            deadline = time.monotonic() + timeout
            while self._shelf.is_still and time.monotonic() < deadline:
                self._changed.wait(_POLL_SECONDS)
            for entry in () if self._shelf.is_still else self._shelf.resting:
                self._recorder.count("useless_prefetches", entry.foreseen)
                self._shelf.remove(entry)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _home(self, key: tuple[str, str]) -> RecordSource:
        home = self._homes.get(Key(*key))
        if home is None:
            raise InvalidInput(f"no record file of this cache has {tuple(key)}")
        return home

    def _wanted(self, keys: Iterable[tuple[str, str]]) -> list[Key]:
        wanted = list(dict.fromkeys(key if isinstance(key, Key) else Key(*key) for key in keys))
        for key in wanted:
            self._home(key)
        return wanted

    def _check_open(self) -> None:
        if self._closed:
            raise SpillMisuse("this record cache is closed; make a new one")
        self._shelf.collect()

    def _admit(self, key: Key, spare: Spare) -> Entry | None:
        home = self._homes[key]
        return self._shelf.admit(home[key], home, spare=spare)

    def _ask(self, request: Request, key: Key) -> None:
        self._policy.touch(key)
        entry = self._shelf.entries.get(key)
        if entry is None:
            request.pending[key] = None
        else:
            self._join(request, entry)

    def _join(self, request: Request, entry: Entry) -> None:
        self._not_foreseen(entry)
        self._shelf.hints.pop(entry, None)
        if entry.loading:
            self._await(request, entry)
            self._loader.hasten(entry, request.priority)
        else:
            request.ready.append((entry.key, self._shelf.pin(entry)))

    def _not_foreseen(self, entry: Entry) -> None:
        """Somebody asks for it now."""
        if entry.foreseen:
            entry.foreseen = False
            self._recorder.count("useful_bytes", entry.nbytes)

    def _await(self, request: Request, entry: Entry) -> None:
        request.expect(entry.key, entry.nbytes)
        entry.waiters.append(weakref.ref(request))

    def _begin(self, request: Request) -> list[Transfer]:
        """Begin to read the pending keys as far as there is room, and join what others began to read of them.

        While plenty is on its way, room is left to gather until it takes a whole call's worth of records.
        """
        is_busy = request.flying_nbytes >= _PLENTY
        if not request.pending or (is_busy and self._shelf.room < CHUNK):
            return []
        begun: list[Entry] = []
        while request.pending:
            key = next(iter(request.pending))
            entry = self._shelf.entries.get(key)
            if entry is not None:
                self._join(request, entry)
            elif (entry := self._admit(key, _unforeseen) or self._admit(key, anything)) is not None:
                begun.append(entry)
                self._await(request, entry)
            else:
                self._make_way(request)
                break
            del request.pending[key]
        return self._loader.prepare(begun, is_busy=is_busy)

    def _make_way(self, request: Request) -> None:
        if self._shelf.hints:
            for hint in self._shelf.superfluous(self._first_pending(request).occupied):
                self._loader.cancel(hint)

    def _take(self, request: Request, most: int | None) -> list[tuple[Key, Lease]]:
        """What arrived first of what was not handed over yet; nothing once everything was."""
        check_process(self._process)
        patience = self._patience
        while True:
            with self._lock:
                if request.is_complete():
                    return []
                self._check_open()
                transfers = self._begin(request)
                if not transfers:
                    if request.ready:
                        return request.hand_over(most)
                    patience -= self._wait(request, patience)
            if transfers:
                self._loader.submit(transfers, request.priority)

    def _wait(self, request: Request, patience: float) -> float:
        """Wait until something changes; the seconds of patience that it took."""
        if self._shelf.loading:
            self._changed.wait()
            return 0.0
        first = self._first_pending(request)
        if patience <= 0 or first.occupied > self.budget:
            request.forget()
            raise self._shelf.no_room(first)
        self._changed.wait(_POLL_SECONDS)  # the death of a lease cannot wake us: it may take no lock
        return _POLL_SECONDS

    def _first_pending(self, request: Request) -> Record:
        key = next(iter(request.pending))
        return self._homes[key][key]

    def _arrived(self, arrivals: Sequence[Arrival]) -> None:
        with self._lock:
            landed = 0
            for entry, error in arrivals:
                self._settle(entry, error)
                landed += entry.nbytes if error is None else 0
            self._recorder.count("read_bytes", landed)
            self._changed.notify_all()

    def _settle(self, entry: Entry, error: Exception | None) -> None:
        if error is None:
            self._shelf.land(entry)
        else:
            self._shelf.remove(entry)
            if isinstance(error, Cancelled) and not entry.waiters:
                self._recorder.count("cancelled_prefetches")
                self._recorder.count("cancelled_bytes", entry.nbytes)
        waiters, entry.waiters = entry.waiters, []
        for waiter in waiters:
            if (request := waiter()) is not None and entry.key in request.flying:
                request.tell(entry.key, entry.nbytes, error or self._shelf.pin(entry))

    def _evicted(self, entry: Entry) -> None:
        self._recorder.count("evictions")
        if entry.foreseen:
            self._recorder.count("useless_prefetches")


def _unforeseen(entry: Entry) -> bool:
    return not entry.foreseen
