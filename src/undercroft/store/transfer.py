"""Moves in flight: one priority queue, a few threads, chunks.

It knows files, addresses and priorities; not tensors, budgets or what is worth moving. A `Transfer` is cut
into chunks of 8 MiB. Workers always take the next chunk of the most urgent class that has room in
flight, so a demand read waits for at most one chunk per worker, and cancelling takes effect at the next
chunk. Invariants: memory named in a transfer is kept alive until its last chunk has come back, also after a
cancel, because the kernel owns it until then; of two workers or more, writes never occupy the last, so they
cannot starve reads; every transfer that was submitted ends, and what went wrong surfaces at `wait`.

A destructor may cancel, and Python may run one in the middle of any call of this module, on a thread that
has the queue's lock. So `cancel` takes no lock: it leaves a note for the workers. A queue may itself be
closed by a finalizer on one of its own threads, which is why the lock is re-entrant.
"""

# pyright: reportPrivateUsage=false
# (a queue moves its transfers through their states, which are nobody else's business)

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field
from enum import IntEnum
from queue import SimpleQueue
from types import TracebackType
from typing import Literal, NamedTuple, Self

import xxhash

from undercroft.errors import CorruptRecord, InvalidInput, SpillMisuse, TransferFailed, UndercroftError
from undercroft.events import Recorder
from undercroft.store.disk import DiskFile, Iovec
from undercroft.store.ranges import round_up
from undercroft.units import MIB

CHUNK = 8 * MIB
"""Bytes of one system call: fewer cost more CPU each, more make a demand wait longer for its turn."""


def cut(nbytes: int) -> Iterator[tuple[int, int]]:
    """Begin and length of the chunks of a run of bytes: as few as can be, and as long as one another.

    A short one would leave the disk with nothing else to do at the end of a burst of long ones.
    """
    size = round_up(-(-nbytes // -(-nbytes // CHUNK)))
    return ((begin, min(size, nbytes - begin)) for begin in range(0, nbytes, size))


class Priority(IntEnum):
    """What goes first: a read someone waits for, a read someone will want, a write, a check of old bytes."""

    DEMAND = 0
    PREFETCH = 1
    WRITE = 2
    SCRUB = 3


class Cancelled(UndercroftError):
    """`wait` on a transfer that was cancelled."""


@dataclass(slots=True)
class Chunk:
    """One system call's worth of a transfer.

    Attributes:
        file: from or to where.
        offset: bytes into the file.
        iovecs: the memory, in file order.
        need: bytes that must move; fewer than the memory where a read passes the end of the file.
        payload: (address, nbytes) of the part that a checksum covers; the rest is alignment.
        nbytes: bytes of memory it covers.
    """

    file: DiskFile
    offset: int
    iovecs: tuple[Iovec, ...]
    need: int
    payload: Iovec
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.nbytes = sum([nbytes for _, nbytes in self.iovecs])


class Transfer:
    """A move in flight.

    Args:
        direction: "read" or "write".
        chunks: what to move, in order; at least one.
        keep: an object that owns the memory; held until the last chunk has come back.
        before: called by a worker before each chunk, to wait until the memory is ready or to see that it is
            still there.
        on_done: called once after the end, however it ended: on a worker, or by a `submit` that is refused.
            It must not submit, for no worker might be left to make room.
        checksums: xxh3 of each chunk's payload: compared after a read; filled in by a write when an empty
            list is given.

    Attributes:
        moved: bytes that have moved so far.
        error: why it failed, or None.
    """

    def __init__(
        self,
        direction: Literal["read", "write"],
        chunks: Sequence[Chunk],
        *,
        keep: object = None,
        before: Callable[[], None] | None = None,
        on_done: Callable[[Transfer], None] | None = None,
        checksums: list[int] | None = None,
    ) -> None:
        assert chunks, "a transfer of nothing would never end"
        self.direction: Literal["read", "write"] = direction
        self.nbytes = sum([chunk.nbytes for chunk in chunks])
        self.moved = 0
        self.priority = Priority.SCRUB
        self.error: UndercroftError | None = None
        self.checksums = checksums
        if checksums is not None and direction == "write":
            checksums[:] = [0] * len(chunks)
        self._waiting = deque(enumerate(chunks))
        self._flying = 0
        self._keep: object = keep
        self._before = before
        self._on_done = on_done
        self._is_over = False
        self._under_way = threading.Lock()  # held until the end; lighter than an event
        self._under_way.acquire()
        self._process = os.getpid()

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._is_over

    def wait(self, timeout: float | None = None) -> bool:
        """Block until it has ended; False if `timeout` seconds passed first.

        Raises:
            UndercroftError: what the move raised: `TierFull`, `TransferFailed`, `CorruptRecord`, `Cancelled`.
            SpillMisuse: it is under way in the process that this one was forked from.
        """
        if not self._settle(timeout):
            return False
        if self.error is None:
            return True
        # A copy, because an error keeps the frames it was raised through, with all that they hold.
        raise copy(self.error) from self.error

    def settle(self) -> None:
        """Block until it has ended, however it ended.

        Raises:
            SpillMisuse: as `wait`.
        """
        self._settle(None)

    def _settle(self, timeout: float | None) -> bool:
        if not self.done():
            check_process(self._process)
        ended = self._under_way.acquire(timeout=-1 if timeout is None else timeout)
        if ended:
            self._under_way.release()  # for the next who waits
        return ended

    def _run(self, index: int, chunk: Chunk) -> None:
        if self._before is not None:
            self._before()
        if self.direction == "write":
            if self.checksums is not None:
                self.checksums[index] = _checksum(chunk.payload)
            chunk.file.write(chunk.offset, chunk.iovecs)
        else:
            chunk.file.read(chunk.offset, chunk.iovecs, chunk.need)
            if self.checksums is not None and self.checksums[index] != _checksum(chunk.payload):
                raise CorruptRecord(
                    f"{chunk.file.name} at {chunk.offset}: the checksum differs from the one written"
                )

    def _end(self) -> None:
        on_done, self._on_done = self._on_done, None
        try:
            if on_done is not None:
                on_done(self)
        except BaseException as raised:
            self.error = self.error or self._surfacing(raised)
        finally:
            self._keep = self._before = None
            self._is_over = True
            self._under_way.release()

    def _surfacing(self, raised: BaseException) -> UndercroftError:
        if isinstance(raised, UndercroftError):
            return raised
        error = TransferFailed(f"{self.direction}: {raised!r}")
        error.__cause__ = raised
        return error


def check_process(owner: int) -> None:
    """Raise `SpillMisuse` in any process but `owner`: a forked child has the locks but not the threads."""
    if os.getpid() != owner:
        raise SpillMisuse(
            f"this belongs to process {owner}, from which this one was forked; make a new one here"
        )


def _checksum(payload: Iovec) -> int:
    address, nbytes = payload
    return xxhash.xxh3_64_intdigest((ctypes.c_char * nbytes).from_address(address))


class _Task(NamedTuple):
    """What a worker does next: carry a chunk, or end a transfer of which no chunk is under way."""

    transfer: Transfer
    chunk: tuple[int, Chunk] | None
    is_slow: bool = False


class TransferQueue:
    """Threads that carry out transfers.

    Args:
        workers: threads, at least 1. Two calls in flight keep one disk busy, and writes never take the last
            thread, so that three are enough for one; more help across several disks.
        max_queued: transfers that may wait at once; `submit` blocks beyond (back-pressure).
        recorder: where each chunk is recorded, on lanes "disk read" and "disk write".

    Raises:
        InvalidInput: less than one worker, or no room for a transfer.
    """

    def __init__(self, *, workers: int = 3, max_queued: int = 4096, recorder: Recorder | None = None) -> None:
        if workers < 1 or max_queued < 1:
            raise InvalidInput(f"{workers} workers and room for {max_queued} transfers would move nothing")
        self._recorder = recorder or Recorder(enabled=False)
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._work = threading.Condition(self._lock)
        self._room = _Bell(self._lock)
        self._classes: dict[Priority, deque[Transfer]] = {priority: deque() for priority in Priority}
        self._cancelled: SimpleQueue[Transfer] = SimpleQueue()
        self._ended: deque[Transfer] = deque()
        self._idle = 0
        self._slow = 0
        self._most_slow = max(1, workers - 1)
        self._max_queued = max_queued
        self._closed = False
        self._busy = {"read": _BusyTime(), "write": _BusyTime()}
        self._threads = [
            threading.Thread(target=self._serve, name=f"undercroft-io-{n}", daemon=True)
            for n in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, transfer: Transfer, priority: Priority) -> Transfer:
        """Queue a transfer behind others of its class, when there is room; a demand never waits for room.

        Raises:
            SpillMisuse: the queue is closed, and the transfer has ended with this error; or it belongs to the
                process that this one was forked from.
        """
        check_process(self._process)
        with self._lock:
            while not self._has_room(priority):
                self._room.wait()
            if not self._closed:
                self._enqueue(transfer, min(priority, transfer.priority))
                return transfer
        transfer.error = SpillMisuse("the transfer queue is closed")
        transfer._end()
        raise transfer.error

    def __len__(self) -> int:
        return sum(len(waiting) for waiting in self._classes.values())

    def promote(self, transfer: Transfer, priority: Priority) -> None:
        """Move what is left of a transfer to the end of a more urgent class, or have it submitted to that."""
        check_process(self._process)
        with self._lock:
            if priority >= transfer.priority:
                return
            was, transfer.priority = transfer.priority, priority
            if transfer in self._classes[was]:
                self._classes[was].remove(transfer)
                self._classes[priority].append(transfer)
                self._work.notify()

    def cancel(self, transfer: Transfer) -> None:
        """Drop the chunks that have not started; `wait` raises `Cancelled` once those under way are back.

        Nothing if no chunk is left to drop: the transfer ends, or ended, by itself. May be called anywhere,
        also by a destructor.
        """
        self._cancelled.put(transfer)

    def rate(self, direction: Literal["read", "write"]) -> float | None:
        """Measured bytes per second of the time with a chunk of that direction in flight; None before any."""
        check_process(self._process)
        with self._lock:
            return self._busy[direction].rate()

    def drain(self, timeout: float) -> bool:
        """Wait until every transfer has ended; False if `timeout` seconds passed first."""
        check_process(self._process)
        with self._lock:
            return self._room.wait_for(lambda: not len(self) and self._idle == len(self._threads), timeout)

    def close(self, timeout: float = 30.0) -> None:
        """Cancel what waits, let chunks under way come back, end the threads; again is allowed.

        A forked child has nothing to close. Called on a thread of the queue, it does not wait.
        """
        if os.getpid() != self._process:
            return
        with self._lock:
            self._closed = True
            for waiting in self._classes.values():
                for transfer in waiting:
                    self.cancel(transfer)
            self._work.notify_all()
            self._room.notify_all()
        deadline = time.monotonic() + timeout
        for thread in self._threads if threading.current_thread() not in self._threads else ():
            thread.join(max(0.0, deadline - time.monotonic()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _has_room(self, priority: Priority) -> bool:
        return priority is Priority.DEMAND or len(self) < self._max_queued or self._closed

    def _enqueue(self, transfer: Transfer, priority: Priority) -> None:
        transfer.priority = priority
        if transfer._waiting:  # else it was cancelled before it came here
            self._classes[priority].append(transfer)
            # A write beyond these waits for a worker that carries one now, or was called for what that one takes next.
            places = self._most_slow - self._slow if priority >= Priority.WRITE else len(self._threads)
            self._work.notify(min(len(transfer._waiting), places))

    def _serve(self) -> None:
        while (task := self._next_task()) is not None:
            if task.chunk is None or self._carry(task.transfer, *task.chunk, is_slow=task.is_slow):
                task.transfer._end()
            del task  # it must not live on while this thread waits

    def _next_task(self) -> _Task | None:
        with self._lock:
            while (task := self._pick()) is None:
                self._idle += 1
                self._room.notify_all()
                if self._closed:
                    return None
                self._work.wait()
                self._idle -= 1
            return task

    def _pick(self) -> _Task | None:
        self._take_cancels()
        if self._ended:
            return _Task(self._ended.popleft(), None)
        for priority, waiting in self._classes.items():
            is_slow = priority >= Priority.WRITE
            if waiting and not (is_slow and self._slow >= self._most_slow):
                return self._start(waiting, is_slow)
        return None

    def _start(self, waiting: deque[Transfer], is_slow: bool) -> _Task:
        transfer = waiting[0]
        chunk = transfer._waiting.popleft()
        if not transfer._waiting:
            waiting.popleft()
            self._room.notify_all()
        transfer._flying += 1
        self._slow += is_slow
        self._busy[transfer.direction].begin()
        return _Task(transfer, chunk, is_slow)

    def _carry(self, transfer: Transfer, index: int, chunk: Chunk, *, is_slow: bool) -> bool:
        """Move a chunk; whether it was the last of its transfer."""
        error: UndercroftError | None = None
        start = time.perf_counter()
        try:
            transfer._run(index, chunk)
        except BaseException as raised:  # whatever it is, it surfaces at wait()
            error = transfer._surfacing(raised)
        if self._recorder.enabled:
            seconds, lane = time.perf_counter() - start, f"disk {transfer.direction}"
            self._recorder.record(transfer.direction, lane, start=start, seconds=seconds, nbytes=chunk.nbytes)
        with self._lock:
            self._busy[transfer.direction].end(0 if error else chunk.nbytes)
            self._slow -= is_slow
            transfer._flying -= 1
            if error is None:
                transfer.moved += chunk.nbytes
            else:
                self._drop(transfer, error)
            return not transfer._waiting and transfer._flying == 0

    def _take_cancels(self) -> None:
        while not self._cancelled.empty():
            transfer = self._cancelled.get()
            if transfer._waiting:
                self._drop(transfer, Cancelled("the transfer was cancelled"))
                if transfer._flying == 0:
                    self._ended.append(transfer)

    def _drop(self, transfer: Transfer, error: UndercroftError) -> None:
        transfer.error = transfer.error or error
        transfer._waiting.clear()
        with suppress(ValueError):  # all of it was under way, or it is not submitted yet
            self._classes[transfer.priority].remove(transfer)
            self._room.notify_all()


class _Bell(threading.Condition):
    """A condition that costs next to nothing to notify while nobody waits."""

    _waiting = 0

    def wait(self, timeout: float | None = None) -> bool:
        self._waiting += 1
        try:
            return super().wait(timeout)
        finally:
            self._waiting -= 1

    def notify_all(self) -> None:
        if self._waiting:
            super().notify_all()


class _BusyTime:
    """Bytes moved, and the time during which at least one chunk was in flight."""

    def __init__(self) -> None:
        self._flying, self._since, self._seconds, self._nbytes = 0, 0.0, 0.0, 0

    def begin(self) -> None:
        if self._flying == 0:
            self._since = time.perf_counter()
        self._flying += 1

    def end(self, nbytes: int) -> None:
        self._flying -= 1
        self._nbytes += nbytes
        if self._flying == 0:
            self._seconds += time.perf_counter() - self._since

    def rate(self) -> float | None:
        return self._nbytes / self._seconds if self._nbytes and self._seconds else None
