"""A file that gets its name only when all its bytes are safe.

It knows names, locks and fsync; not what the bytes mean. Until `publish` the bytes lie in
``<name>.partial``, held by a lock. Invariants: a file under its final name is whole and on the disk, also
after a power cut; `discard` leaves nothing; what a killed process left under ``.partial`` is taken over by
the next writer, and never while its owner lives.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from undercroft.errors import SpillMisuse, TierFull, TransferFailed, UndercroftError
from undercroft.store.disk import Syscalls, open_file
from undercroft.store.ranges import BLOCK, round_up

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class PartialFile:
    """A file in the making, written once from its beginning to its end.

    Args:
        path: its final name.
        buffer: memory that bytes are gathered in; nobody else may use it meanwhile.
        syscalls: the seam for doubles.

    Raises:
        SpillMisuse: another writer is making the same file.
        TierFull, TransferFailed: it cannot be created.
    """

    def __init__(self, path: Path, buffer: mmap.mmap, *, syscalls: Syscalls | None = None) -> None:
        self.path = path
        self.nbytes = 0
        self._name = path.with_name(f"{path.name}.partial")
        self._buffer = buffer
        with _typed_errors(self._name):
            self._lock = _claim(self._name)
            try:
                self._file = open_file(str(self._name), os.O_RDWR, name=str(path), syscalls=syscalls)
            except BaseException:
                os.unlink(self._name)
                os.close(self._lock)
                raise

    def append(self, block: memoryview) -> None:
        """Add bytes at the end.

        Raises:
            TierFull, TransferFailed: the disk took them not; the file can only be discarded.
        """
        done = 0
        while done < len(block):
            filled = self.nbytes % len(self._buffer)
            step = min(len(block) - done, len(self._buffer) - filled)
            self._buffer[filled : filled + step] = block[done : done + step]
            done += step
            self.nbytes += step
            if filled + step == len(self._buffer):
                self._write(len(self._buffer))

    def pad(self) -> None:
        """Add zeros up to a multiple of 4096 bytes."""
        self.append(memoryview(bytes(-self.nbytes % BLOCK)))

    def finish(self) -> None:
        """Bring every byte to the disk.

        Raises:
            TierFull, TransferFailed: the disk took them not; the file can only be discarded.
        """
        rest = self.nbytes % len(self._buffer)
        if rest:
            whole = round_up(rest)
            self._buffer[rest:whole] = bytes(whole - rest)
            self._write(whole)
        with _typed_errors(self._name):
            self._file.truncate(self.nbytes)
            os.fsync(self._file.fd)

    def publish(self) -> None:
        """Give it its name, and bring the name to the disk.

        Raises:
            TierFull, TransferFailed: the directory cannot be written.
        """
        with _typed_errors(self.path):
            os.replace(self._name, self.path)
            self._name = self.path
            _sync_directory(self.path.parent)

    def discard(self) -> None:
        """Remove it, whichever name it has, and close it; after `close` this does nothing."""
        if self._lock >= 0:
            with suppress(FileNotFoundError):
                os.unlink(self._name)
        self.close()

    def close(self) -> None:
        """Close it and let go of the lock; again is allowed."""
        self._file.close()
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)

    def _write(self, nbytes: int) -> None:
        start = (self.nbytes - 1) // len(self._buffer) * len(self._buffer)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))
        self._file.write(start, [(address, nbytes)])


def _claim(partial: Path) -> int:
    """A locked file of that name, which may hold what a killed writer left; `finish` cuts that off."""
    fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_called(fd, partial):  # published or discarded by its writer after we had opened it
            raise BlockingIOError
    except BlockingIOError as error:
        os.close(fd)
        raise SpillMisuse(f"{partial} is being written; wait for that, or choose another name") from error
    except BaseException:
        os.close(fd)
        raise
    return fd


def _is_called(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _typed_errors(path: Path) -> Generator[None]:
    try:
        yield
    except UndercroftError:
        raise
    except OSError as error:
        text = f"{path}: {error.strerror}"
        if error.errno in _FULL:
            raise TierFull(text, errno=error.errno) from error
        raise TransferFailed(text, errno=error.errno) from error
