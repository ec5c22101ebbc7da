"""Files that hold a model's tensors, whatever their format: open, read, and watched for changes.

It knows bytes and names; a subclass knows where a format says which tensor lies where. Invariant: what is read is of
the files that were opened, or it is said that they were changed.

PyTorch's product of one row with a float32 matrix may round otherwise where the matrix begins elsewhere modulo 16 bytes
(oneMKL does so on AMD's processors), and transformers computes with a weight where it lies in the mapped file. So what
is read here begins where it begins there: its *phase*.
"""

from __future__ import annotations

import math
import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from undercroft.errors import CorruptRecord, TransferFailed

LINE = 16
"""Bytes modulo which PyTorch's products heed where a float32 matrix begins."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        name: as the checkpoint calls it.
        file: which of the checkpoint's files, by number.
        dtype: of its elements, little-endian.
        shape: row-major.
        offset: of its first byte in the file.
        phase: where it begins modulo `LINE` where PyTorch maps the checkpoint.
    """

    name: str
    file: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    phase: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Version:
    """What a file was when its header was read; a file that differs was changed since."""

    nbytes: int
    changed_ns: int
    status_changed_ns: int
    """By the system's own clock: a program may set the time of the last write back, and not this one."""

    @staticmethod
    def of(fd: int) -> Version:
        """That of an open file."""
        status = os.fstat(fd)
        return Version(status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class TensorFiles(Mapping[str, StoredTensor]):
    """The tensors of some files by name.

    Args:
        paths: the files.

    Attributes:
        paths: the files, in the order of their numbers.
        versions: what each was when it was opened.
        header_nbytes: bytes before the first tensor of each.

    Raises:
        UnsupportedModel, CorruptRecord: see the subclass.
        TransferFailed: a file cannot be read.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self.header_nbytes: list[int] = []
        self._fds: list[int] = []
        self._tensors: dict[str, StoredTensor] = {}
        try:
            for path in self.paths:
                self._fds.append(_open(path))
            self.versions = [Version.of(fd) for fd in self._fds]
            for number in range(len(self.paths)):
                self.header_nbytes.append(self._read_header(number))
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def _read_header(self, number: int) -> int:
        """Note the tensors of a file; bytes of what comes before them."""

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        """The tensor itself, through the page cache, at its phase.

        Raises:
            CorruptRecord: the file became shorter.
            TransferFailed: the system refused.
        """
        if not tensor.nbytes:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        room = bytearray(tensor.nbytes + LINE)
        first = (tensor.phase - torch.frombuffer(room, dtype=torch.uint8).data_ptr()) % LINE
        self.read_run(tensor, 0, memoryview(room)[first : first + tensor.nbytes])
        count = math.prod(tensor.shape)
        return torch.frombuffer(room, dtype=tensor.dtype, count=count, offset=first).view(tensor.shape)

    def read_run(self, tensor: StoredTensor, start: int, memory: memoryview) -> None:
        """Fill memory with a tensor's bytes from one of them on.

        Raises:
            CorruptRecord, TransferFailed: see `read`.
        """
        self.read_into(tensor.file, tensor.offset + start, memory)

    def read_into(self, file: int, offset: int, memory: memoryview) -> None:
        """Fill memory with the bytes of a file from an offset on.

        Raises:
            CorruptRecord, TransferFailed: see `read`.
        """
        done = 0
        while done < len(memory):
            try:
                moved = os.preadv(self._fds[file], [memory[done:]], offset + done)
            except OSError as error:
                raise TransferFailed(f"{self.paths[file]}: {error.strerror}", errno=error.errno) from error
            if moved == 0:
                raise CorruptRecord(f"{self.paths[file]} ends at byte {offset + done}; fetch it again")
            done += moved

    def check_unchanged(self) -> None:
        """See that no file was written to since it was opened.

        Raises:
            CorruptRecord: one was.
        """
        for path, fd, version in zip(self.paths, self._fds, self.versions, strict=True):
            if Version.of(fd) != version:
                raise CorruptRecord(f"{path} was changed while it was in use; load the model again")

    def close(self) -> None:
        """Close the files; again is allowed."""
        while self._fds:
            os.close(self._fds.pop())

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise TransferFailed(f"{path} cannot be read: {error.strerror}", errno=error.errno) from error
