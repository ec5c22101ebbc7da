"""Honest doubles for tests: disks that are slow, full or flaky, and a clock that moves when told.

The disks stand at the store's own seam, `undercroft.store.disk.Syscalls`, and do real reads and writes to
real files underneath; nothing is patched. They wrap one another: ``SlowDisk(1e8, inner=FlakyDisk())``.
Invariant: where its fault does not apply, a double answers exactly as the system calls it wraps.
"""

from __future__ import annotations

import errno as errno_codes
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal

from undercroft.errors import InvalidInput
from undercroft.store.disk import Iovec, Syscalls

Call = Literal["preadv", "pwritev", "fallocate"]


class ManualClock:
    """A clock that stands still until a test advances it. Calling it gives its seconds.

    Pass it wherever a clock is taken, and its `sleep` wherever a sleep is taken.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self._seconds = seconds
        self._sleepers = 0
        self._changed = threading.Condition()

    def __call__(self) -> float:
        """Seconds on this clock."""
        return self._seconds

    def advance(self, seconds: float) -> None:
        """Let time pass; wakes every thread whose sleep is over."""
        with self._changed:
            self._seconds += seconds
            self._changed.notify_all()

    def sleep(self, seconds: float) -> None:
        """Block the calling thread until the clock was advanced by `seconds`."""
        with self._changed:
            wake_at = self._seconds + seconds
            self._sleepers += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._seconds >= wake_at)
            self._sleepers -= 1

    def wait_for_sleepers(self, count: int, *, patience: float = 30.0) -> None:
        """Block until `count` threads sleep on this clock.

        Raises:
            TimeoutError: they did not within `patience` real seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._sleepers >= count, patience):
                raise TimeoutError(f"{self._sleepers} of {count} threads sleep after {patience} s")


class _WrappedDisk(Syscalls):
    """System calls that pass through to others."""

    def __init__(self, inner: Syscalls | None) -> None:
        super().__init__()
        self._inner = inner or Syscalls()

    def preadv(self, fd: int, iovecs: Sequence[Iovec], offset: int) -> int:
        return self._inner.preadv(fd, iovecs, offset)

    def pwritev(self, fd: int, iovecs: Sequence[Iovec], offset: int) -> int:
        return self._inner.pwritev(fd, iovecs, offset)

    def fallocate(self, fd: int, offset: int, nbytes: int) -> None:
        self._inner.fallocate(fd, offset, nbytes)

    def drop_cache(self, fd: int, offset: int, nbytes: int) -> None:
        self._inner.drop_cache(fd, offset, nbytes)

    def close(self, fd: int) -> None:
        self._inner.close(fd)


class SlowDisk(_WrappedDisk):
    """A disk that moves bytes one transfer after another, at a given rate.

    Args:
        bytes_per_second: the rate that all reads and writes share.
        latency: seconds that each transfer waits on top, at the same time as others.
        clock: what tells the time, such as a `ManualClock`.
        sleep: what waits, such as `ManualClock.sleep`.
        inner: the system calls underneath.
    """

    def __init__(
        self,
        bytes_per_second: float,
        latency: float = 0.0,
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
        inner: Syscalls | None = None,
    ) -> None:
        super().__init__(inner)
        if bytes_per_second <= 0 or latency < 0:
            raise InvalidInput(f"no disk moves {bytes_per_second} bytes/s with a latency of {latency} s")
        self._rate, self._latency = bytes_per_second, latency
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._free_from = clock()

    def preadv(self, fd: int, iovecs: Sequence[Iovec], offset: int) -> int:
        """As the seam, after the time it takes."""
        self._take_time(_nbytes(iovecs))
        return super().preadv(fd, iovecs, offset)

    def pwritev(self, fd: int, iovecs: Sequence[Iovec], offset: int) -> int:
        """As the seam, after the time it takes."""
        self._take_time(_nbytes(iovecs))
        return super().pwritev(fd, iovecs, offset)

    def _take_time(self, nbytes: int) -> None:
        with self._lock:
            now = self._clock()
            self._free_from = max(now, self._free_from) + nbytes / self._rate
            wait = self._free_from + self._latency - now
        self._sleep(wait)


class FullDisk(_WrappedDisk):
    """A disk of `capacity` bytes: a write across its end is cut short, one beyond it fails with ENOSPC.

    A file takes the bytes up to its furthest end, written or reserved, as long as this double lives.
    """

    def __init__(self, capacity: int, *, inner: Syscalls | None = None) -> None:
        super().__init__(inner)
        self._capacity = capacity
        self._lock = threading.Lock()
        self._ends: dict[tuple[int, int], int] = {}

    def pwritev(self, fd: int, iovecs: Sequence[Iovec], offset: int) -> int:
        """As the seam; may write less than asked. Raises OSError with ENOSPC."""
        granted = self._grant(fd, offset, _nbytes(iovecs), whole=False)
        return super().pwritev(fd, _first(iovecs, granted), offset)

    def fallocate(self, fd: int, offset: int, nbytes: int) -> None:
        """As the seam. Raises OSError with ENOSPC, and reserves nothing then."""
        self._grant(fd, offset, nbytes, whole=True)
        super().fallocate(fd, offset, nbytes)

    def _grant(self, fd: int, offset: int, nbytes: int, *, whole: bool) -> int:
        """Bytes of a range that have room, which they take."""
        status = os.fstat(fd)
        file = (status.st_dev, status.st_ino)
        with self._lock:
            end = self._ends.get(file, 0)
            room = self._capacity - sum(self._ends.values()) + end
            granted = min(offset + nbytes, room) - offset
            if granted <= 0 or (whole and granted < nbytes):
                raise _failure(errno_codes.ENOSPC)
            self._ends[file] = max(end, offset + granted)
        return granted


class FlakyDisk(_WrappedDisk):
    """A disk on which some calls fail.

    Args:
        errno: the code they fail with.
        call: the system call concerned.
        at: the first of these calls that fails, counted from 1.
        times: how many in a row fail; None for all that follow.
        inner: the system calls underneath.
    """

    def __init__(
        self,
        errno: int = errno_codes.EIO,
        *,
        call: Call = "preadv",
        at: int = 1,
        times: int | None = 1,
        inner: Syscalls | None = None,
    ) -> None:
        super().__init__(inner)
        self._errno, self._call_name, self._at, self._times = errno, call, at, times
        self._lock = threading.Lock()
        self._seen = 0

    @property
    def failed(self) -> int:
        """How many calls failed so far."""
        failing = max(0, self._seen - self._at + 1)
        return failing if self._times is None else min(failing, self._times)

    def preadv(self, fd: int, iovecs: Sequence[Iovec], offset: int) -> int:
        """As the seam, or OSError."""
        self._maybe_fail("preadv")
        return super().preadv(fd, iovecs, offset)

    def pwritev(self, fd: int, iovecs: Sequence[Iovec], offset: int) -> int:
        """As the seam, or OSError."""
        self._maybe_fail("pwritev")
        return super().pwritev(fd, iovecs, offset)

    def fallocate(self, fd: int, offset: int, nbytes: int) -> None:
        """As the seam, or OSError."""
        self._maybe_fail("fallocate")
        super().fallocate(fd, offset, nbytes)

    def _maybe_fail(self, call: Call) -> None:
        if call != self._call_name:
            return
        with self._lock:
            before = self.failed
            self._seen += 1
            fails = self.failed > before
        if fails:
            raise _failure(self._errno)


def _nbytes(iovecs: Sequence[Iovec]) -> int:
    return sum(nbytes for _, nbytes in iovecs)


def _first(iovecs: Sequence[Iovec], nbytes: int) -> list[Iovec]:
    """The first `nbytes` of a list of memory ranges."""
    kept: list[Iovec] = []
    for address, length in iovecs:
        if nbytes > 0:
            kept.append((address, min(length, nbytes)))
        nbytes -= length
    return kept


def _failure(code: int) -> OSError:
    return OSError(code, os.strerror(code))
