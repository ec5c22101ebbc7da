"""Write-once bytes of a training step: out to disk, back into memory, gone.

It knows where bytes lie and how to cut a move into chunks; not which bytes deserve it, nor when they move:
it makes transfers, and a `TransferQueue` carries them out. Invariants: an extent is written before it is
read and never rewritten; every byte of it returns to the file when it is dropped; once a write failed,
nothing more is written (`writable` turns False) and the caller keeps its bytes.

Memory of any address can be written by O_DIRECT without a copy: the transfer covers the whole 4096-byte
blocks that the bytes touch. Those blocks lie in pages that are mapped because our bytes are in them; what
else they hold goes to the file unread, and an extent remembers how far into its first block its bytes
start. A fetched copy starts equally far into a block, so it keeps the alignment that the kernels of torch
saw.

A destructor may drop an extent in the middle of any call of this module on the same thread, so `drop` takes
no lock: it only puts the extent into a re-entrant queue, from which the next call that looks for room
collects it.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from undercroft.errors import InvalidInput, SpillMisuse, TierFull, TransferFailed
from undercroft.store.directory import PrivateDirectory
from undercroft.store.disk import DiskFile, Syscalls
from undercroft.store.ranges import BLOCK, FreeRanges, round_up
from undercroft.store.slab import Lease, Lender
from undercroft.store.transfer import CHUNK, Chunk, Transfer, check_process
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

    @property
    def window(self) -> int:
        """Bytes of the whole blocks that ours touch."""
        return round_up(self.head + self.nbytes)


class Scratch:
    """The spill file, or one per disk.

    Args:
        directories: where; two on two disks share each large write between them.
        buffers: where fetched bytes go.
        capacity: most bytes of disk to occupy; None for what the disks have.
        write_cap: most bytes ever written, to spare an SSD; None for no cap.
        checksums: verify every byte that comes back (xxh3, about 0.12 CPU-s per GB).
        chunk: bytes of one system call.
        syscalls: the seam for doubles.

    Attributes:
        writable: False once a write failed, the cap was reached, or the scratch was closed.
        written: bytes written, and bytes of writes under way; what was cancelled in time does not count.

    Raises:
        UnsafeDirectory: a directory cannot hold private bytes.
        TierFull: a disk has no room for even an empty file.
    """

    def __init__(
        self,
        directories: Sequence[str | Path],
        *,
        buffers: Lender,
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
        self._buffers, self._chunk = buffers, round_up(chunk)
        self._capacity, self._write_cap, self._checksums = capacity, write_cap, checksums
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._dropped: SimpleQueue[Extent] = SimpleQueue()
        self._closed = False
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
        self._reached = [0] * len(self._files)
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
            self._collect()
            return sum(ranges.size - ranges.free for ranges in self._ranges)

    @property
    def files(self) -> tuple[DiskFile, ...]:
        """The spill files, one per directory."""
        return tuple(self._files)

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
        """Allocate an extent and make the transfer that writes memory at any address to it.

        Args:
            address: where they are.
            nbytes: how many; at least 1.
            keep: an object that owns the memory, held until the transfer has ended.
            before: see `Transfer`.
            on_done: see `Transfer`; a transfer that failed or was cancelled has already dropped its extent.

        Raises:
            TierFull: there is no room, the cap on written bytes is reached, or an earlier write failed.
            TransferFailed: the disk refused to make room.
            SpillMisuse: the scratch is closed, or belongs to the process that this one was forked from.
        """
        self._check_usable()
        head = address % BLOCK
        window = round_up(head + nbytes)
        extent = Extent(self._allocate(window), head, nbytes, [] if self._checksums else None)
        chunks = list(self._chunks(extent, address - head))

        def ended(transfer: Transfer) -> None:
            if transfer.error is not None:
                self._give_up(extent, transfer)
            if on_done is not None:
                on_done(transfer)

        sums = extent.checksums
        return extent, Transfer("write", chunks, keep=keep, before=before, on_done=ended, checksums=sums)

    def fetch(
        self,
        extent: Extent,
        *,
        buffers: Lender | None = None,
        on_done: Callable[[Transfer], None] | None = None,
    ) -> tuple[Lease, Transfer] | None:
        """Lease room and make the transfer that reads an extent back; None where there is no room now.

        The bytes start `extent.head` bytes into the lease.

        Args:
            extent: what was spilled.
            buffers: where its bytes are to arrive; the scratch's own if None.
            on_done: see `Transfer`.

        Raises:
            SpillMisuse: as `spill`.
        """
        self._check_usable()
        lease = (buffers or self._buffers).lease(extent.window)
        if lease is None:
            return None
        chunks = list(self._chunks(extent, lease.address))
        return lease, Transfer("read", chunks, keep=lease, on_done=on_done, checksums=extent.checksums)

    def drop(self, extent: Extent) -> None:
        """Return an extent's room, once. The caller sees to it that no transfer of it is under way.

        May be called anywhere, also by a destructor.
        """
        self._dropped.put(extent)

    def trim(self) -> int:
        """Cut the free end off the files; returns the bytes given back to the disks."""
        return self._trim(lambda file: 0)

    def trim_unreached(self) -> int:
        """Cut off what nothing reached since the last call, where that is most of a file; returns the bytes given back.

        Room is taken at the lowest offset that fits, so what a shorter step does without is at the end.
        """

        def keep(file: int) -> int:
            reached, self._reached[file] = self._reached[file], 0
            size = self._ranges[file].size
            return reached if size - reached > max(reached, _GROWTH) else size

        return self._trim(keep)

    def close(self) -> None:
        """Close the files, which frees their room, and remove the subdirectories; again is allowed."""
        self.writable, self._closed = False, True
        for file in self._files:
            file.close()
        for directory in self._directories:
            directory.close()

    def _trim(self, keep: Callable[[int], int]) -> int:
        self._check_usable()
        with self._lock:
            self._collect()
            freed = 0
            for index, (file, ranges) in enumerate(zip(self._files, self._ranges, strict=True)):
                if cut := ranges.cut_tail(keep(index)):
                    file.truncate(ranges.size)
                    freed += cut
        return freed

    def _check_usable(self) -> None:
        check_process(self._process)
        if self._closed:
            raise SpillMisuse("this scratch is closed; make a new one")

    def _give_up(self, extent: Extent, transfer: Transfer) -> None:
        with self._lock:
            self.written -= transfer.nbytes - transfer.moved
        self.drop(extent)
        if _ends_writing(transfer.error):
            self.writable = False

    def _collect(self) -> None:
        while not self._dropped.empty():
            self._give(self._dropped.get().pieces)

    def _give(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            self._ranges[piece.file].give(piece.offset, piece.nbytes)

    def _allocate(self, window: int) -> tuple[Piece, ...]:
        with self._lock:
            self._collect()
            self._check_writable(window)
            pieces: list[Piece] = []
            try:
                for nbytes in self._stripes(window):
                    pieces.append(self._place(nbytes))
            except BaseException:
                self._give(pieces)
                raise
            self.written += window
        return tuple(pieces)

    def _check_writable(self, window: int) -> None:
        if not self.writable:
            raise TierFull("nothing more is spilled, since a write failed or the cap was reached")
        if self._write_cap is not None and self.written + window > self._write_cap:
            self.writable = False
            raise TierFull(f"the cap of {format_size(self._write_cap)} on bytes written is reached")

    def _stripes(self, window: int) -> Iterator[int]:
        files = len(self._files)
        share = max(round_up(-(-window // files)), self._chunk) if files > 1 else window
        for start in range(0, window, share):
            yield min(share, window - start)

    def _place(self, nbytes: int) -> Piece:
        """Room in the file whose turn it is, or in another that has some."""
        others = len(self._files) - 1
        while True:
            file = next(self._next_file)
            try:
                return Piece(file, self._take(file, nbytes), nbytes)
            except TierFull:
                if others == 0:
                    raise
            others -= 1

    def _take(self, file: int, nbytes: int) -> int:
        ranges = self._ranges[file]
        offset = ranges.take(nbytes)
        if offset is None:
            self._grow(file, nbytes)
            offset = ranges.take(nbytes)
            assert offset is not None
        self._reached[file] = max(self._reached[file], offset + nbytes)
        return offset

    def _grow(self, file: int, nbytes: int) -> None:
        ranges = self._ranges[file]
        growth = self._growth(nbytes)
        try:
            self._files[file].reserve(ranges.size, growth)
        except TierFull:
            growth = nbytes
            self._files[file].reserve(ranges.size, growth)
        except TransferFailed:
            self.writable = False
            raise
        ranges.grow(growth)

    def _growth(self, nbytes: int) -> int:
        if self._capacity is None:
            return max(nbytes, _GROWTH)
        room = self._capacity - sum(ranges.size for ranges in self._ranges)
        if room < nbytes:
            allowed = format_size(self._capacity)
            raise TierFull(f"{format_size(nbytes)} more would exceed the {allowed} of disk allowed")
        return nbytes  # so that no file takes what another will need

    def _chunks(self, extent: Extent, address: int) -> Iterator[Chunk]:
        """Chunks of the extent's whole blocks, the first of which lies in memory at `address`."""
        ours, end = address + extent.head, address + extent.head + extent.nbytes
        for piece in extent.pieces:
            for start in range(0, piece.nbytes, self._chunk):
                nbytes = min(self._chunk, piece.nbytes - start)
                first = max(address, ours)
                payload = (first, min(address + nbytes, end) - first)
                yield Chunk(
                    self._files[piece.file], piece.offset + start, ((address, nbytes),), nbytes, payload
                )
                address += nbytes


def _ends_writing(error: BaseException | None) -> bool:
    """Whether a failed write says something of the disk; EFAULT only says that the memory was taken away."""
    return isinstance(error, OSError) and error.errno != errno.EFAULT
