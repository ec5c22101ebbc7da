"""Moves in flight: one priority queue, a few threads, chunks.

It knows files, addresses and priorities; not tensors, budgets or what is worth moving. A `Transfer` is cut into
chunks of a few MiB. Workers always take the next chunk of the most urgent class that has room in flight, so a demand
read waits for at most one chunk per worker, and cancelling takes effect at the next chunk. Invariants: memory named
in a transfer is kept alive until its last chunk has come back, also after a cancel, because the kernel owns it until
then; writes never occupy the last worker, so they cannot starve reads; a failure surfaces at `wait`.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from types import TracebackType
from typing import Literal, Self

import xxhash

from undercroft.errors import CorruptRecord, SpillMisuse, TransferFailed, UndercroftError
from undercroft.events import Recorder
from undercroft.store.disk import DiskFile, Iovec
from undercroft.units import MIB

CHUNK = 4 * MIB


class Priority(IntEnum):
    """What goes first: a read someone waits for, a read someone will want, a write, a check of old bytes."""

    DEMAND = 0
    PREFETCH = 1
    WRITE = 2
    SCRUB = 3


class Cancelled(UndercroftError):
    """`wait` on a transfer that was cancelled."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One system call's worth of a transfer.

    Attributes:
        file: from or to where.
        offset: bytes into the file.
        iovecs: the memory, in file order.
        need: bytes that must move; fewer than the memory where a read passes the end of the file.
        payload: (address, nbytes) of the part that a checksum covers; the rest is alignment.
    """

    file: DiskFile
    offset: int
    iovecs: tuple[Iovec, ...]
    need: int
    payload: Iovec

    @property
    def nbytes(self) -> int:
        """Bytes of memory it covers."""
        return sum(nbytes for _, nbytes in self.iovecs)


class Transfer:
    """A move in flight.

    Args:
        direction: "read" or "write".
        chunks: what to move, in order.
        keep: an object that owns the memory; held until the last chunk has come back.
        before: called by a worker before the first chunk, to wait for the memory to be ready.
        on_done: called once, on a worker, after the end, however it ended; so `cancel` may be called under any lock.
        checksums: xxh3 of each chunk's payload: compared after a read; filled in by a write when an empty list is given.
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
        self.direction: Literal["read", "write"] = direction
        self.nbytes = sum(chunk.nbytes for chunk in chunks)
        self.priority = Priority.DEMAND
        self.error: BaseException | None = None
        self.checksums = checksums
        if checksums is not None and direction == "write":
            checksums[:] = [0] * len(chunks)
        self._waiting = deque(enumerate(chunks))
        self._flying = 0
        self._keep: object = keep
        self._before = before
        self._on_done = on_done
        self._finished = threading.Event()

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._finished.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Block until it has ended; False if `timeout` seconds passed first.

        Raises:
            Exception: what the move raised: `TierFull`, `TransferFailed`, `CorruptRecord` or `Cancelled`.
        """
        if not self._finished.wait(timeout):
            return False
        if self.error is not None:
            raise self.error
        return True

    def settle(self) -> None:
        """Block until it has ended, however it ended."""
        self._finished.wait()

    def _run(self, index: int, chunk: Chunk) -> None:
        before, self._before = self._before, None
        if before is not None:
            before()
        if self.direction == "write":
            if self.checksums is not None:
                self.checksums[index] = _checksum(chunk.payload)
            chunk.file.write(chunk.offset, chunk.iovecs)
        else:
            chunk.file.read(chunk.offset, chunk.iovecs, chunk.need)
            if self.checksums is not None and self.checksums[index] != _checksum(chunk.payload):
                raise CorruptRecord(f"{chunk.file.name} at {chunk.offset}: the checksum differs from the one written")


def _checksum(payload: Iovec) -> int:
    import ctypes

    address, nbytes = payload
    return xxhash.xxh3_64_intdigest((ctypes.c_char * nbytes).from_address(address))


class TransferQueue:
    """Threads that carry out transfers.

    Args:
        workers: threads. Two keep one disk busy; more help across several disks.
        max_queued: transfers that may wait at once; `submit` blocks beyond (back-pressure).
        recorder: where each chunk is recorded, on lanes "disk read" and "disk write".
    """

    def __init__(self, *, workers: int = 2, max_queued: int = 4096, recorder: Recorder | None = None) -> None:
        self._recorder = recorder or Recorder(enabled=False)
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._room = threading.Condition(self._lock)
        self._classes: dict[Priority, deque[Transfer]] = {priority: deque() for priority in Priority}
        self._ended: deque[Transfer] = deque()
        self._flying: Counter[Priority] = Counter()
        self._most_writes = max(1, workers - 1)
        self._max_queued = max_queued
        self._closed = False
        self._busy = {"read": _BusyTime(), "write": _BusyTime()}
        self._threads = [threading.Thread(target=self._serve, name=f"undercroft-io-{n}", daemon=True) for n in range(workers)]
        for thread in self._threads:
            thread.start()

    def submit(self, transfer: Transfer, priority: Priority) -> Transfer:
        """Queue a transfer behind others of its class.

        Raises:
            SpillMisuse: the queue is closed.
        """
        with self._lock:
            while len(self) >= self._max_queued and not self._closed:
                self._room.wait()
            if self._closed:
                raise SpillMisuse("the transfer queue is closed")
            transfer.priority = priority
            if transfer._waiting:  # else it was cancelled before it came here
                self._classes[priority].append(transfer)
                self._work.notify(min(len(transfer._waiting), len(self._threads)))
        return transfer

    def __len__(self) -> int:
        return sum(len(waiting) for waiting in self._classes.values())

    def promote(self, transfer: Transfer, priority: Priority) -> None:
        """Move what is left of a queued transfer to the end of a more urgent class."""
        with self._lock:
            if priority < transfer.priority and transfer in self._classes[transfer.priority]:
                self._classes[transfer.priority].remove(transfer)
                self._classes[priority].append(transfer)
                transfer.priority = priority
                self._work.notify()

    def cancel(self, transfer: Transfer) -> bool:
        """Drop the chunks that have not started; `wait` then raises `Cancelled`, once those under way are back.

        Returns:
            False if nothing was left to drop: the transfer ends, or ended, by itself.
        """
        with self._lock:
            if not transfer._waiting:
                return False
            self._drop(transfer, Cancelled("the transfer was cancelled"))
            if transfer._flying == 0:
                self._ended.append(transfer)
                self._work.notify()
        return True

    def rate(self, direction: Literal["read", "write"]) -> float | None:
        """Measured bytes per second while at least one chunk of that direction was in flight; None before any."""
        with self._lock:
            return self._busy[direction].rate()

    def drain(self, timeout: float) -> bool:
        """Wait until nothing is queued or in flight; False if `timeout` seconds passed first."""
        deadline = time.monotonic() + timeout
        with self._lock:
            while len(self) or self._flying.total():
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._room.wait(left)
        return True

    def close(self, timeout: float = 30.0) -> None:
        """Cancel what waits, let chunks under way come back, end the threads; again is allowed."""
        with self._lock:
            self._closed = True
            waiting = [transfer for queue in self._classes.values() for transfer in queue]
            self._work.notify_all()
            self._room.notify_all()
        for transfer in waiting:
            self.cancel(transfer)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _serve(self) -> None:
        while True:
            with self._lock:
                while not self._ended and (picked := self._pick()) is None:
                    if self._closed:
                        return
                    self._work.wait()
                ended = self._ended.popleft() if self._ended else None
            if ended is not None:
                self._finish(ended)
            else:
                self._carry(*picked)

    def _pick(self) -> tuple[Transfer, Priority, int, Chunk] | None:
        for priority, queue in self._classes.items():
            if not queue or (priority >= Priority.WRITE and self._slow_chunks() >= self._most_writes):
                continue
            transfer = queue[0]
            index, chunk = transfer._waiting.popleft()
            if not transfer._waiting:
                queue.popleft()
                self._room.notify_all()
            transfer._flying += 1
            self._flying[priority] += 1
            self._busy[transfer.direction].begin()
            return transfer, priority, index, chunk
        return None

    def _slow_chunks(self) -> int:
        return self._flying[Priority.WRITE] + self._flying[Priority.SCRUB]

    def _carry(self, transfer: Transfer, priority: Priority, index: int, chunk: Chunk) -> None:
        error: BaseException | None = None
        start = time.perf_counter()
        try:
            transfer._run(index, chunk)
        except BaseException as raised:  # whatever it is, it surfaces at wait()
            error = raised if isinstance(raised, UndercroftError) else TransferFailed(f"{transfer.direction}: {raised!r}")
        seconds = time.perf_counter() - start
        self._recorder.record(transfer.direction, f"disk {transfer.direction}", start=start, seconds=seconds, nbytes=chunk.nbytes)
        with self._lock:
            self._busy[transfer.direction].end(0 if error else chunk.nbytes)
            self._flying[priority] -= 1
            transfer._flying -= 1
            if error is not None:
                self._drop(transfer, error)
            finished = not transfer._waiting and transfer._flying == 0
            if priority >= Priority.WRITE:
                self._work.notify()  # the place among the writes that this chunk held is free again
        if finished:
            self._finish(transfer)

    def _drop(self, transfer: Transfer, error: BaseException) -> None:
        transfer.error = transfer.error or error
        if transfer._waiting:
            transfer._waiting.clear()
            if transfer in self._classes[transfer.priority]:
                self._classes[transfer.priority].remove(transfer)
            self._room.notify_all()

    def _finish(self, transfer: Transfer) -> None:
        on_done, transfer._on_done = transfer._on_done, None
        try:
            if on_done is not None:
                on_done(transfer)
        finally:
            transfer._keep = None
            transfer._finished.set()
            with self._lock:
                self._room.notify_all()


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
