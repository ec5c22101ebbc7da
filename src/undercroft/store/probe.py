"""Measures a disk: how fast it reads and writes runs of 8 MiB with 1, 4 and 8 of them in flight.

It knows nothing of transfers, slabs or budgets, so that it can be asked before any of them exists, and its
answer is the yardstick for them. Invariants: the file it measures on has no name (or loses it at once), holds
written blocks before anything is timed, and is gone when the call ends, however it ends.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from undercroft import machine
from undercroft.errors import TierFull, TransferFailed, UndercroftError, UnsafeDirectory
from undercroft.machine import DepthRates, DiskRates
from undercroft.units import MIB, format_size

_DEPTHS = (1, 4, 8)
_CHUNK = 8 * MIB
_BUFFERS = 16
"""So many places are moved to in turn: a few would stay in the processor's cache, and no one else's bytes do."""
_PAGE = 4096
_SECONDS_PER_PASS = 0.7
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_UNWRITABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR})
_Move = Callable[[int, list[memoryview], int], int]  # os.preadv or os.pwritev
_log = logging.getLogger(__name__)


def disk_rates(directory: str | os.PathLike[str], *, remeasure: bool = False) -> DiskRates:
    """What the disk under a directory does: from the machine's cache, else measured now and kept.

    Raises:
        UnsafeDirectory, TierFull, TransferFailed: as `measure_disk`.
    """
    if not remeasure and (cached := machine.cached_rates(directory)):
        return cached
    rates = measure_disk(directory)
    try:
        machine.store_rates(directory, rates)
    except (OSError, UnsafeDirectory) as error:
        _log.info("the rates of %s were measured, but could not be kept: %s", directory, error)
    return rates


def measure_disk(directory: str | os.PathLike[str], *, nbytes: int = 256 * MIB) -> DiskRates:
    """Measure sequential reads and writes; takes under 6 seconds on any disk faster than 100 MB/s.

    Args:
        directory: where the unnamed file is made; nothing is left in it.
        nbytes: size of that file at most: a quarter of the free space bounds it too.

    Raises:
        UnsafeDirectory: the directory is missing or cannot be written.
        TierFull: there is no room for a file of 8 MiB.
        TransferFailed: the disk failed a read or a write.
    """
    disk = machine.disk(directory)
    room = disk.free // 4 if disk.total else nbytes  # some file systems in RAM state no size at all
    nchunks = min(nbytes, room) // _CHUNK
    if nchunks < 1:
        raise TierFull(
            f"measuring {disk.directory} needs {format_size(_CHUNK)} in a quarter of its free space; "
            f"asked for {format_size(nbytes)}, and {format_size(disk.free)} are free"
        )
    with (
        _typed_errors(disk.directory),
        tempfile.TemporaryFile(dir=disk.directory, buffering=0) as file,
    ):
        probe = _Probe(file.fileno(), _buffers(_BUFFERS))
        probe.fill(nchunks)
        depths = tuple(probe.measure(depth) for depth in _DEPTHS)
    today = datetime.now(UTC).date().isoformat()
    return DiskRates(device=disk.device, measured=today, direct=probe.direct, depths=depths)


class _Probe:
    """Timed passes over one file; each moves every chunk once, or ends early when its time is up."""

    def __init__(self, fd: int, buffers: list[memoryview]) -> None:
        self._fd = fd
        self._buffers = buffers
        self._nchunks = 0
        self.direct = False

    def fill(self, nchunks: int) -> None:
        """Write the file once, for writing to blocks that were never written is slower; may end shorter."""
        os.posix_fallocate(self._fd, 0, nchunks * _CHUNK)
        self.direct = _go_direct(self._fd, self._buffers[0])
        moved, _ = self._pass(os.pwritev, 1, range(nchunks))
        self._nchunks = moved // _CHUNK

    def measure(self, depth: int) -> DepthRates:
        return DepthRates(depth=depth, read=self._rate(os.preadv, depth), write=self._rate(os.pwritev, depth))

    def _rate(self, move: _Move, depth: int) -> float:
        moved, seconds = self._pass(move, depth, range(self._nchunks))
        return moved / seconds

    def _pass(self, move: _Move, depth: int, chunks: Iterable[int]) -> tuple[int, float]:
        """Move chunks from `depth` threads; the bytes moved and the seconds it took."""
        if not self.direct:
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        queue = iter(chunks)  # shared: each thread takes the next chunk
        with ThreadPoolExecutor(depth) as threads:
            workers = [threads.submit(self._work, move, queue, start) for _ in range(depth)]
            moved = sum(worker.result() for worker in workers)
        if not self.direct:
            os.fdatasync(self._fd)
        return moved, time.perf_counter() - start

    def _work(self, move: _Move, queue: Iterator[int], start: float) -> int:
        moved = 0
        for index in queue:
            if move(self._fd, [self._buffers[index % _BUFFERS]], index * _CHUNK) != _CHUNK:
                raise OSError(errno.EIO, "moved only part of 8 MiB")
            moved += _CHUNK
            if time.perf_counter() - start > _SECONDS_PER_PASS:
                break
        return moved


def _go_direct(fd: int, buffer: memoryview) -> bool:
    """Switch the file to O_DIRECT if its file system takes a write that way; else leave it as it is."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        os.pwritev(fd, [buffer[:_PAGE]], 0)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
        return False
    return True


def _buffers(count: int) -> list[memoryview]:
    """Page-aligned buffers of one chunk, in huge pages where the kernel has them, with random content."""
    arena = mmap.mmap(-1, count * _CHUNK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without transparent huge pages
        arena.madvise(mmap.MADV_HUGEPAGE)
    noise = os.urandom(_CHUNK)  # a file system that compresses must not look fast
    whole = memoryview(arena)
    buffers = [whole[index * _CHUNK : (index + 1) * _CHUNK] for index in range(count)]
    for buffer in buffers:
        buffer[:] = noise
    return buffers


@contextmanager
def _typed_errors(directory: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, UndercroftError):
            raise
        text = f"measuring the disk of {directory} failed: {error.strerror}"
        if error.errno in _FULL:
            raise TierFull(text, errno=error.errno) from error
        if error.errno in _UNWRITABLE:
            raise UnsafeDirectory(text) from error
        raise TransferFailed(text, errno=error.errno) from error
