"""Write-once bytes of a training step: out to disk, back into the slab, gone.

It knows where bytes lie and how to cut a move into chunks; not which bytes deserve it, nor when they move: it makes
transfers, and a `TransferQueue` carries them out. Invariants: an extent is
written before it is read and never rewritten; every byte of it returns to the file when it is dropped; once a write
found the disk full, nothing more is written (`writable` turns False) and the caller keeps its bytes.

Memory of any address can be written by O_DIRECT without a copy: the transfer covers the whole 4096-byte blocks that
the bytes touch. Those blocks lie in pages that are mapped because our bytes are in them; what else they hold goes to
the file unread, and an extent remembers how far into its first block its bytes start. A fetched copy starts equally
far into a block, so it keeps the alignment that the kernels of torch saw.
"""

from __future__ import annotations

import errno
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from undercroft.errors import InvalidInput, TierFull
from undercroft.store.directory import PrivateDirectory
from undercroft.store.disk import DiskFile, Syscalls
from undercroft.store.ranges import BLOCK, FreeRanges, round_up
from undercroft.store.slab import Lease, Slab
from undercroft.store.transfer import CHUNK, Chunk, Transfer
from undercroft.units import MIB, format_size

_GROWTH = 64 * MIB


@dataclass(frozen=True, slots=True)
class Piece:
    """A contiguous part of an extent: which file, where, how many bytes."""

    file: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class Extent:
    """Where bytes lie.

    Attributes:
        pieces: the parts, in order; more than one only where several disks share the bytes.
        head: bytes of the first block that come before ours.
        nbytes: how many bytes are ours.
        checksums: xxh3 per chunk, or None where they are off.
    """

    pieces: tuple[Piece, ...]
    head: int
    nbytes: int
    checksums: list[int] | None


class Scratch:
    """The spill file, or one per disk.

    Args:
        directories: where; two on two disks share each large write between them.
        slab: where fetched bytes go.
        capacity: most bytes of disk to occupy; None for what the disks have.
        write_cap: most bytes ever written, to spare an SSD; None for no cap.
        checksums: verify every byte that comes back (xxh3, about 0.12 CPU-s per GB).
        chunk: bytes of one system call.
        syscalls: the seam for doubles.
    """

    def __init__(
        self,
        directories: Sequence[str | Path],
        *,
        slab: Slab,
        capacity: int | None = None,
        write_cap: int | None = None,
        checksums: bool = False,
        chunk: int = CHUNK,
        syscalls: Syscalls | None = None,
    ) -> None:
        if not directories:
            raise InvalidInput("a scratch needs at least one directory")
        self.writable = True
        self.written = 0
        self._slab, self._chunk = slab, round_up(chunk)
        self._capacity, self._write_cap, self._checksums = capacity, write_cap, checksums
        self._lock = threading.Lock()
        self._directories: list[PrivateDirectory] = []
        self._files: list[DiskFile] = []
        self._ranges: list[FreeRanges] = []
        try:
            for path in directories:
                self._directories.append(PrivateDirectory(path))
                self._files.append(self._directories[-1].create(syscalls=syscalls))
                self._ranges.append(FreeRanges())
        except BaseException:
            self.close()
            raise
        self._next_file = itertools.cycle(range(len(self._files)))

    @property
    def directory(self) -> Path:
        """The first of the directories."""
        return self._directories[0].path

    @property
    def direct(self) -> bool:
        """Whether every file bypasses the page cache."""
        return all(file.direct for file in self._files)

    @property
    def occupied(self) -> int:
        """Bytes of live extents."""
        with self._lock:
            return sum(ranges.size - ranges.free for ranges in self._ranges)

    @property
    def file_nbytes(self) -> int:
        """Bytes the files have grown to."""
        with self._lock:
            return sum(ranges.size for ranges in self._ranges)

    def spill(
        self,
        address: int,
        nbytes: int,
        *,
        keep: object,
        before: Callable[[], None] | None = None,
        on_done: Callable[[Transfer], None] | None = None,
    ) -> tuple[Extent, Transfer]:
        """Allocate an extent and make the transfer that writes `nbytes` (at least 1) of memory at any address to it.

        Args:
            address: where they are.
            nbytes: how many.
            keep: an object that owns the memory, held until the transfer has ended.
            before: see `Transfer`.
            on_done: see `Transfer`; a transfer that failed or was cancelled has already dropped its extent.

        Raises:
            TierFull: there is no room, the cap on written bytes is reached, or an earlier write found the disk full.
        """
        head = address % BLOCK
        window = round_up(head + nbytes)
        extent = Extent(self._allocate(window), head, nbytes, [] if self._checksums else None)
        chunks = list(self._chunks(extent, address - head))

        def ended(transfer: Transfer) -> None:
            if transfer.error is not None:
                self.drop(extent)
                self.writable = self.writable and not _ends_writing(transfer.error)
            if on_done is not None:
                on_done(transfer)

        return extent, Transfer("write", chunks, keep=keep, before=before, on_done=ended, checksums=extent.checksums)

    def fetch(
        self, extent: Extent, *, on_done: Callable[[Transfer], None] | None = None
    ) -> tuple[Lease, Transfer] | None:
        """Lease room and make the transfer that reads an extent back; None where the slab has no room now.

        The bytes start `extent.head` bytes into the lease.
        """
        lease = self._slab.lease(extent.head + extent.nbytes)
        if lease is None:
            return None
        chunks = list(self._chunks(extent, lease.address))
        return lease, Transfer("read", chunks, keep=lease, on_done=on_done, checksums=extent.checksums)

    def drop(self, extent: Extent) -> None:
        """Return an extent's room. The caller sees to it that no transfer of it is under way."""
        with self._lock:
            for piece in extent.pieces:
                self._ranges[piece.file].give(piece.offset, piece.nbytes)

    def trim(self) -> int:
        """Cut the free end off the files; returns the bytes given back to the disks."""
        with self._lock:
            freed = 0
            for file, ranges in zip(self._files, self._ranges, strict=True):
                if cut := ranges.cut_tail():
                    file.truncate(ranges.size)
                    freed += cut
        return freed

    def close(self) -> None:
        """Close the files, which frees their room, and remove the subdirectories; again is allowed."""
        self.writable = False
        for file in self._files:
            file.close()
        for directory in self._directories:
            directory.close()

    def _allocate(self, window: int) -> tuple[Piece, ...]:
        with self._lock:
            if not self.writable:
                raise TierFull("the spill directory takes no more bytes since a write to it failed")
            if self._write_cap is not None and self.written + window > self._write_cap:
                self.writable = False
                raise TierFull(f"the cap of {format_size(self._write_cap)} on bytes written is reached")
            pieces: list[Piece] = []
            try:
                for nbytes in self._stripes(window):
                    pieces.append(self._take(next(self._next_file), nbytes))
            except BaseException:
                for piece in pieces:
                    self._ranges[piece.file].give(piece.offset, piece.nbytes)
                raise
            self.written += window
        return tuple(pieces)

    def _stripes(self, window: int) -> Iterator[int]:
        files = len(self._files)
        share = max(round_up(-(-window // files)), self._chunk) if files > 1 else window
        for start in range(0, window, share):
            yield min(share, window - start)

    def _take(self, file: int, nbytes: int) -> Piece:
        ranges = self._ranges[file]
        offset = ranges.take(nbytes)
        if offset is None:
            self._grow(file, nbytes)
            offset = ranges.take(nbytes)
            assert offset is not None
        return Piece(file, offset, nbytes)

    def _grow(self, file: int, nbytes: int) -> None:
        ranges = self._ranges[file]
        occupied = sum(each.size for each in self._ranges)
        room = None if self._capacity is None else self._capacity - occupied
        if room is not None and room < nbytes:
            raise TierFull(f"{format_size(nbytes)} more would exceed the {format_size(self._capacity or 0)} of disk allowed")
        growth = max(nbytes, _GROWTH) if room is None else max(nbytes, min(_GROWTH, room // BLOCK * BLOCK))
        try:
            self._files[file].reserve(ranges.size, growth)
        except TierFull:
            growth = nbytes
            self._files[file].reserve(ranges.size, growth)
        ranges.grow(growth)

    def _chunks(self, extent: Extent, address: int) -> Iterator[Chunk]:
        """Chunks of the extent's whole blocks, the first of which lies in memory at `address`."""
        ours, end = address + extent.head, address + extent.head + extent.nbytes
        for piece in extent.pieces:
            for start in range(0, piece.nbytes, self._chunk):
                nbytes = min(self._chunk, piece.nbytes - start)
                first = max(address, ours)
                payload = (first, min(address + nbytes, end) - first)
                yield Chunk(self._files[piece.file], piece.offset + start, ((address, nbytes),), nbytes, payload)
                address += nbytes


def _ends_writing(error: BaseException) -> bool:
    """Whether a failed write says something of the disk; EFAULT only says that the memory was taken away."""
    return isinstance(error, OSError) and error.errno != errno.EFAULT
