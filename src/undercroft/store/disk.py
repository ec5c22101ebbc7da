"""One open file of tensor bytes: positioned reads and writes that are whole or raise a typed error.

It knows a descriptor, alignment and errno values; not what the bytes mean, nor queues or budgets. Invariant:
a call either moved every byte asked for or raised; a short read or write is never taken for a whole one.

`Syscalls` is the seam at which the honest doubles of `undercroft.testing` (slow, full and flaky disks) stand.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from collections.abc import Callable, Sequence

from undercroft.errors import CorruptRecord, TierFull, TransferFailed
from undercroft.store.ranges import BLOCK

Iovec = tuple[int, int]
"""(address, nbytes) of memory."""
_Call = Callable[[int, Sequence[Iovec], int], int]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_AGAIN = {errno.EINTR, errno.EAGAIN}
_REFUSED = {errno.EINVAL, errno.EOPNOTSUPP}
_MOST_IOVECS = 1024  # the system takes no more at once
_log = logging.getLogger(__name__)


class _CIovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("nbytes", ctypes.c_size_t))


class Syscalls:
    """The system calls that move bytes, on raw addresses. ctypes releases the GIL around each."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._read, self._write = (libc.preadv64, libc.pread64), (libc.pwritev64, libc.pwrite64)
        for scattered, plain in (self._read, self._write):
            scattered.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)
            plain.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64)
            scattered.restype = plain.restype = ctypes.c_ssize_t
        self._fallocate = libc.fallocate64
        self._fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        self._sync_range = libc.sync_file_range
        self._sync_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)

    def preadv(self, fd: int, iovecs: Sequence[Iovec], offset: int) -> int:
        """Bytes read at `offset` into the memory of `iovecs`; may be fewer than asked. Raises OSError."""
        return self._call(*self._read, fd, iovecs, offset)

    def pwritev(self, fd: int, iovecs: Sequence[Iovec], offset: int) -> int:
        """Bytes written at `offset` from the memory of `iovecs`; may be fewer than asked. Raises OSError."""
        return self._call(*self._write, fd, iovecs, offset)

    def fallocate(self, fd: int, offset: int, nbytes: int) -> None:
        """Reserve disk blocks. Raises OSError, also where posix_fallocate would write into every block."""
        _check(self._fallocate(fd, 0, offset, nbytes))

    def close(self, fd: int) -> None:
        """Close the descriptor."""
        os.close(fd)

    def drop_cache(self, fd: int, offset: int, nbytes: int) -> None:
        """Write dirty pages back and drop them from the page cache. Raises OSError: bytes were lost."""
        _check(self._sync_range(fd, offset, nbytes, 7))  # wait before, write, wait after
        os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def _call(
        self,
        scattered: Callable[..., int],
        plain: Callable[..., int],
        fd: int,
        iovecs: Sequence[Iovec],
        offset: int,
    ) -> int:
        if len(iovecs) == 1:
            return _check(plain(fd, *iovecs[0], offset))
        count = min(len(iovecs), _MOST_IOVECS)
        vector = (_CIovec * count)(*iovecs[:count])
        return _check(scattered(fd, ctypes.byref(vector), count, offset))


def _check(answer: int) -> int:
    if answer < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return answer


class DiskFile:
    """An open file and how to move bytes of it.

    Args:
        fd: an open descriptor; closed by `close`.
        name: what errors call it.
        direct: the descriptor was opened with O_DIRECT: addresses, offsets and lengths must be multiples of
            4096. Otherwise each range is dropped from the page cache after it was moved.
        syscalls: the seam.
    """

    def __init__(self, fd: int, name: str, *, direct: bool, syscalls: Syscalls | None = None) -> None:
        self.fd = fd
        self.name = name
        self.direct = direct
        self._syscalls = syscalls or Syscalls()
        self._lost: OSError | None = None

    def read(self, offset: int, iovecs: Sequence[Iovec], need: int | None = None) -> None:
        """Fill the memory of `iovecs` from `offset` on.

        Args:
            offset: where in the file, bytes.
            iovecs: where in memory.
            need: bytes that must come; fewer than the memory holds where a block is read past the file's end.

        Raises:
            CorruptRecord: the file ends before `need` bytes.
            TransferFailed: the system refused, twice where the device reported an error.
        """
        if need is None:
            need = sum(nbytes for _, nbytes in iovecs)
        self._move(self._syscalls.preadv, "read", offset, iovecs, need)

    def write(self, offset: int, iovecs: Sequence[Iovec]) -> None:
        """Write the memory of `iovecs` at `offset`.

        Raises:
            TierFull: no room on the device, in the quota or under the file size limit.
            TransferFailed: the system refused, twice where the device reported an error.
        """
        self._move(self._syscalls.pwritev, "write", offset, iovecs, sum(nbytes for _, nbytes in iovecs))

    def reserve(self, offset: int, nbytes: int) -> None:
        """Allocate blocks now, so that a full disk is met here rather than in the middle of a write.

        Raises:
            TierFull: no room.
            TransferFailed: the system refused.
        """
        while True:
            try:
                return self._syscalls.fallocate(self.fd, offset, nbytes)
            except OSError as error:
                if error.errno == errno.EOPNOTSUPP:
                    return None
                if error.errno not in _AGAIN:
                    raise self._typed("reserve", error, offset, nbytes) from error

    def truncate(self, nbytes: int) -> None:
        """Cut the file to `nbytes`."""
        os.ftruncate(self.fd, nbytes)

    def close(self) -> None:
        """Close the descriptor; again is allowed."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            self._syscalls.close(fd)

    def _move(self, call: _Call, verb: str, offset: int, iovecs: Sequence[Iovec], need: int) -> None:
        done = stuck = failures = 0
        while done < need:
            try:
                moved = call(self.fd, _rest(iovecs, done) if done else iovecs, offset + done)
            except OSError as error:
                failures += error.errno not in _AGAIN
                if error.errno in _AGAIN or (error.errno == errno.EIO and failures < 2):
                    continue
                raise self._typed(verb, error, offset + done, need - done) from error
            if done + moved >= need:
                break
            # A short transfer goes on from an aligned place, so its last partial block is moved again.
            stuck = stuck + 1 if moved < BLOCK else 0
            if moved == 0 or stuck > 2:
                raise self._ended(verb, offset, done + moved, need)
            done += moved // BLOCK * BLOCK
        if not self.direct:
            self._drop_cache(verb, offset, need)

    def _drop_cache(self, verb: str, offset: int, nbytes: int) -> None:
        # What the page cache could not write back is gone, and the system tells so once, to whichever call
        # asks first. So a loss is remembered, and nothing read after it is believed.
        try:
            self._syscalls.drop_cache(self.fd, offset, nbytes)
        except OSError as error:
            self._lost = self._lost or error
        if self._lost is not None:
            raise self._typed(verb, self._lost, offset, nbytes) from self._lost

    def _ended(self, verb: str, offset: int, done: int, need: int) -> CorruptRecord | TierFull:
        text = f"{verb} of {need} bytes at {offset} of {self.name} ended after {done}"
        if verb == "read":
            return CorruptRecord(f"{text}: the file is shorter than its index says")
        return TierFull(f"{text}: the disk takes no more")

    def _typed(self, verb: str, error: OSError, offset: int, nbytes: int) -> TierFull | TransferFailed:
        text = f"{verb} of {nbytes} bytes at {offset} of {self.name}: {error.strerror}"
        code = error.errno or errno.EIO
        is_full = code in _FULL and verb != "read"  # a page cache that lost bytes may say so too
        return TierFull(text, errno=code) if is_full else TransferFailed(text, errno=code)


def _rest(iovecs: Sequence[Iovec], done: int) -> Sequence[Iovec]:
    rest: list[Iovec] = []
    for address, nbytes in iovecs:
        skip = min(done, nbytes)
        done -= skip
        if nbytes > skip:
            rest.append((address + skip, nbytes - skip))
    return rest


def can_go_direct(fd: int, *, syscalls: Syscalls | None = None) -> bool:
    """Whether O_DIRECT with 4096-byte alignment really works on a descriptor opened with it.

    Some file systems accept the flag and refuse the first transfer, or ask for more alignment: `statx` says
    so on Linux 6.1 and newer; a trial read settles the rest.
    """
    wanted = _direct_alignment(fd)
    if wanted is not None and not 0 < wanted <= BLOCK:
        return False
    buffer = ctypes.create_string_buffer(2 * BLOCK)
    address = ctypes.addressof(buffer)
    try:
        (syscalls or Syscalls()).preadv(fd, [(address + -address % BLOCK, BLOCK)], 0)
    except OSError as error:
        return error.errno not in _REFUSED
    return True


class _Statx(ctypes.Structure):
    _fields_ = (
        ("mask", ctypes.c_uint32),
        ("before", ctypes.c_uint8 * 148),
        ("dio_mem_align", ctypes.c_uint32),
        ("dio_offset_align", ctypes.c_uint32),
        ("after", ctypes.c_uint8 * 96),
    )


def _direct_alignment(fd: int) -> int | None:
    """Bytes of alignment that `statx` says O_DIRECT asks for: 0 for no O_DIRECT, None where it cannot say."""
    at_empty_path, dioalign = 0x1000, 0x2000
    answer = _Statx()
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "statx") or libc.statx(fd, b"", at_empty_path, dioalign, ctypes.byref(answer)):
        return None
    if not answer.mask & dioalign:
        return None
    return max(answer.dio_mem_align, answer.dio_offset_align) if answer.dio_mem_align else 0


def open_file(
    path: str,
    flags: int,
    *,
    name: str,
    dir_fd: int | None = None,
    mode: int = 0o600,
    syscalls: Syscalls | None = None,
) -> DiskFile:
    """Open an existing file, or an O_TMPFILE, with O_DIRECT where it works, else buffered with a log line.

    Raises:
        OSError: the file cannot be opened at all.
    """
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        fd = os.open(path, flags | os.O_DIRECT, mode, dir_fd=dir_fd)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    else:
        if can_go_direct(fd, syscalls=syscalls):
            return DiskFile(fd, name, direct=True, syscalls=syscalls)
        os.close(fd)
    fd = os.open(path, flags, mode, dir_fd=dir_fd)
    _log.warning("%s: this file system refuses O_DIRECT; buffered I/O is used, which costs more CPU", name)
    return DiskFile(fd, name, direct=False, syscalls=syscalls)
