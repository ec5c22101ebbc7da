"""A record file open for reading: weights on disk that never change.

It knows one data file, its index and its checksums; not which records deserve memory, nor when they are
read. Invariant: bytes that `read` or `settle` accepted are those that were written.

Every record begins and ends on a multiple of 4096 bytes, so it is read with O_DIRECT into a lease, whole,
and records that lie side by side are read with one call.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import xxhash

from undercroft.errors import CorruptRecord, InvalidInput, TransferFailed
from undercroft.store.disk import DiskFile, Iovec, Syscalls, open_file
from undercroft.store.index import RecordIndex, index_path
from undercroft.store.record import Key, Record
from undercroft.store.slab import Lease
from undercroft.store.transfer import CHUNK, Chunk, cut
from undercroft.units import MIB, format_size

Verify = Literal["once", "always", "never"]
_LARGEST_INDEX = 256 * MIB


class RecordSource(Protocol):
    """Where a cache reads records from: a record file, or the files of others where the same bytes lie."""

    path: Path

    def __getitem__(self, key: tuple[str, str], /) -> Record: ...

    def __iter__(self) -> Iterator[tuple[str, str]]: ...

    def chunks(self, pieces: Sequence[tuple[Record, int]]) -> list[Chunk]:
        """The system calls that read records, each to an address; see `RecordFile.chunks`."""
        ...

    def settle(self, record: Record, address: int, *, moved: bool) -> None:
        """Check a record that was read to an address, once more if need be; see `RecordFile.settle`."""
        ...


class RecordFile(Mapping[tuple[str, str], Record]):
    """The records of a file by (name, kind), and how to read them. Made by `open`.

    Attributes:
        path: the data file.
        metadata: what its writer said about the whole.
    """

    def __init__(self, path: Path, index: RecordIndex, file: DiskFile, verify: Verify) -> None:
        self.path = path
        self.metadata: Mapping[str, Any] = index.metadata
        self._records: dict[tuple[str, str], Record] = {record.key: record for record in index.records}
        self._file = file
        self._verify: Verify = verify
        self._verified: set[Key] = set()

    @staticmethod
    def open(
        path: str | os.PathLike[str], *, verify: Verify = "once", syscalls: Syscalls | None = None
    ) -> RecordFile:
        """Open a record file.

        Args:
            path: the data file; the index lies beside it.
            verify: compare checksums at the first read of each record, at every one, or never.
            syscalls: the seam for doubles.

        Raises:
            InvalidInput: there is no record file of that name, or no such `verify`.
            WrongVersion: it is of another version.
            CorruptRecord: the index describes what cannot be, or the data is not as long as it says.
            TransferFailed: it cannot be read.
        """
        if verify not in ("once", "always", "never"):
            raise InvalidInput(f"records can be verified once, always or never, not {verify!r}")
        index = RecordIndex.parse(_read_index(index_path(path)), str(index_path(path)))
        file = _open_regular(Path(path), syscalls)
        try:
            _check_length(index, os.fstat(file.fd).st_size, str(path))
        except BaseException:
            file.close()
            raise
        return RecordFile(Path(path), index, file, verify)

    @property
    def direct(self) -> bool:
        """Whether reads bypass the page cache."""
        return self._file.direct

    def chunks(self, pieces: Sequence[tuple[Record, int]]) -> list[Chunk]:
        """The system calls that read records which follow one another in the file to an address each.

        Several records must not exceed one chunk together. The checksums are left to `settle`.
        """
        first, address = pieces[0]
        if len(pieces) > 1 or first.occupied <= CHUNK:
            return [
                _chunk(self._file, first.offset, [(address, record.occupied) for record, address in pieces])
            ]
        return [
            _chunk(self._file, first.offset + start, [(address + start, nbytes)])
            for start, nbytes in cut(first.occupied)
        ]

    def read(self, key: tuple[str, str], lease: Lease) -> None:
        """Read a record into a lease, on this thread.

        Raises:
            InvalidInput: there is no such record, or the lease is too small for its `occupied` bytes.
            CorruptRecord: twice the bytes differed from those written.
            TransferFailed: twice the disk failed.
        """
        record = self._records.get(key)
        if record is None:
            raise InvalidInput(f"{self.path} has no record {tuple(key)}")
        if lease.nbytes < record.occupied:
            raise InvalidInput(
                f"record {tuple(key)} occupies {record.occupied} bytes, the lease has {lease.nbytes}"
            )
        try:
            self._move(record, lease.address)
            moved = True
        except (CorruptRecord, TransferFailed):
            moved = False
        self.settle(record, lease.address, moved=moved)

    def settle(self, record: Record, address: int, *, moved: bool) -> None:
        """Check a record that a transfer read to `address`; if it is wrong or was not `moved`, read it again.

        Raises:
            CorruptRecord: the bytes still differ from those written.
            TransferFailed: the disk failed again.
        """
        if moved and self._is_intact(record, address):
            return
        self._move(record, address)
        if not self._is_intact(record, address):
            raise CorruptRecord(
                f"record {tuple(record.key)} of {self.path}: in two reads the checksum differed from the one "
                "written; check the disk, and write or download the file again"
            )

    def close(self) -> None:
        """Close the data file, which nobody may be reading; again is allowed."""
        self._file.close()

    def __getitem__(self, key: tuple[str, str]) -> Record:
        return self._records[key]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _move(self, record: Record, address: int) -> None:
        try:
            self._file.read(record.offset, [(address, record.occupied)])
        except CorruptRecord as error:
            raise CorruptRecord(f"record {tuple(record.key)} of {self.path}: {error}") from error

    def _is_intact(self, record: Record, address: int) -> bool:
        if self._verify == "never" or (self._verify == "once" and record.key in self._verified):
            return True
        content = (ctypes.c_char * record.nbytes).from_address(address)
        intact = xxhash.xxh3_64_intdigest(content) == record.checksum
        if intact:
            self._verified.add(record.key)
        return intact


def homes(files: Sequence[RecordSource]) -> dict[Key, RecordSource]:
    """Which of several files has each record.

    Raises:
        InvalidInput: two have the same.
    """
    found: dict[Key, RecordSource] = {}
    for file in files:
        for name, kind in file:
            other = found.setdefault(Key(name, kind), file)
            if other is not file:
                raise InvalidInput(f"{other.path} and {file.path} both have a record {(name, kind)}")
    return found


def _chunk(file: DiskFile, offset: int, iovecs: Sequence[Iovec]) -> Chunk:
    nbytes = sum(length for _, length in iovecs)
    return Chunk(file, offset, tuple(iovecs), nbytes, payload=iovecs[0])


def _read_index(path: Path) -> bytes:
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST_INDEX:
                raise CorruptRecord(f"{path} is no regular file of at most {format_size(_LARGEST_INDEX)}")
            return file.read(_LARGEST_INDEX)
    except FileNotFoundError as error:
        text = f"there is no record file here: {path} is missing; a writer that was killed leaves none"
        raise InvalidInput(text) from error
    except OSError as error:
        raise TransferFailed(f"{path}: {error.strerror}", errno=error.errno) from error


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe of that name must not make us wait for its writer


def _open_regular(path: Path, syscalls: Syscalls | None) -> DiskFile:
    real = os.path.realpath(path)  # downloads are often links into a store of blobs
    try:
        file = open_file(real, os.O_RDONLY | os.O_NONBLOCK, name=str(path), syscalls=syscalls)
    except OSError as error:
        raise TransferFailed(f"{path}: {error.strerror}", errno=error.errno) from error
    if stat.S_ISREG(os.fstat(file.fd).st_mode):
        return file
    file.close()
    raise CorruptRecord(f"{path} is no regular file")


def _check_length(index: RecordIndex, nbytes: int, name: str) -> None:
    if nbytes == index.data_nbytes:
        return
    cut = next((record for record in index.records if record.end > nbytes), None)
    victim = f"; record {tuple(cut.key)} is cut off" if cut else ""
    raise CorruptRecord(f"{name} is {nbytes} bytes long, and its index says {index.data_nbytes}{victim}")
