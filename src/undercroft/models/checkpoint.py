"""The tensors of a folder of safetensors files: which bytes of which file each is.

It reads headers, and bytes when asked; it knows no model. A header is another's text: every number in it is checked
against the file before it is believed. Invariant: a `StoredTensor` lies whole inside its file, and is as long as its
dtype and shape say.

PyTorch's product of one row with a float32 matrix may round otherwise where the matrix begins elsewhere modulo 16 bytes
(oneMKL does so on AMD's processors), and transformers computes with a weight where it lies in the mapped file. So what
is read here begins where it begins there: its *phase*.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import torch

from undercroft.errors import CorruptRecord, TransferFailed, UnsupportedModel

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The element types of safetensors that torch has too, by the format's name."""
LINE = 16
"""Bytes modulo which PyTorch's products heed where a float32 matrix begins."""
PHASES = "undercroft.phases"
"""What metadata calls a JSON object of phases by name, of tensors that PyTorch maps in another file than this one."""
_LONGEST_HEADER = 100_000_000  # the format's own limit
_INDEX = "model.safetensors.index.json"


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


class Checkpoint(Mapping[str, StoredTensor]):
    """A folder's tensors by name.

    Args:
        folder: it holds `model.safetensors.index.json` and the files that it names, or else `*.safetensors`.

    Attributes:
        paths: the files, in the order of their numbers.
        versions: what each was when it was opened.

    Raises:
        UnsupportedModel: there is no such file, or a tensor's type is unknown.
        CorruptRecord: a header contradicts itself or its file, or a tensor occurs twice.
        TransferFailed: a file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names = [path.name for path in _files(folder)]
        self.paths = [(folder / name).resolve() for name in self._names]  # the hub's cache is made of links
        self._fds: list[int] = []
        self._tensors: dict[str, StoredTensor] = {}
        try:
            for path in self.paths:
                self._fds.append(_open(path))
            self.versions = [Version.of(fd) for fd in self._fds]
            for number in range(len(self.paths)):
                self._read_header(number)
        except BaseException:
            self.close()
            raise

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
        self.read_into(tensor.file, tensor.offset, memoryview(room)[first : first + tensor.nbytes])
        count = math.prod(tensor.shape)
        return torch.frombuffer(room, dtype=tensor.dtype, count=count, offset=first).view(tensor.shape)

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

    @property
    def files(self) -> list[Path]:
        """All files of weights, with the index where there is one."""
        index = [self._folder / _INDEX] if (self._folder / _INDEX).is_file() else []
        return [*(self._folder / path for path in self._names), *index]

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

    def _read_header(self, number: int) -> None:
        path, nbytes = self.paths[number], self.versions[number].nbytes
        (length,) = struct.unpack("<Q", self._bytes(number, 0, 8)) if nbytes >= 8 else (nbytes,)
        if length > min(_LONGEST_HEADER, nbytes - 8):
            raise CorruptRecord(f"{path} is no safetensors file: its header would be {length} bytes long")
        try:
            header: Any = json.loads(self._bytes(number, 8, length))
        except (ValueError, RecursionError) as error:
            raise CorruptRecord(f"{path} is no safetensors file: its header is no JSON") from error
        if not isinstance(header, dict):
            raise CorruptRecord(f"{path} is no safetensors file: its header is no object")
        start = 8 + length
        entries = cast("dict[str, Any]", header)
        phases = _phases(path, entries.pop("__metadata__", None))
        for name, entry in entries.items():
            if name in self._tensors:
                raise CorruptRecord(f"{path} has {name}, which another file has too")
            found = _tensor(path, name, entry, number, start, nbytes)
            self._tensors[name] = replace(found, phase=phases.get(name, found.phase))

    def _bytes(self, file: int, offset: int, nbytes: int) -> bytearray:
        content = bytearray(nbytes)
        self.read_into(file, offset, memoryview(content))
        return content


def _tensor(path: Path, name: str, entry: Any, file: int, start: int, nbytes: int) -> StoredTensor:
    try:
        kind, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sane = all(type(number) is int and 0 <= number < 2**63 for number in (*shape, first, last))
    except (TypeError, KeyError, ValueError) as error:
        raise CorruptRecord(f"{path}: the header does not say where {name} is") from error
    if not sane or not isinstance(kind, str):
        raise CorruptRecord(f"{path}: the header does not say where {name} is")
    if kind not in DTYPES:
        raise UnsupportedModel(f"{path}: {name} is of type {kind}, which torch does not have")
    if start + last > nbytes or last - first != math.prod(shape) * DTYPES[kind].itemsize:
        raise CorruptRecord(f"{path}: {name} does not lie inside the file as its shape says")
    return StoredTensor(name, file, DTYPES[kind], shape, start + first, (start + first) % LINE)


def _phases(path: Path, metadata: Any) -> dict[str, int]:
    """The phases that a file's metadata names."""
    try:
        phases = (
            cast("dict[str, Any]", json.loads(metadata[PHASES])) if metadata and PHASES in metadata else {}
        )
        sane = all(type(phase) is int and 0 <= phase < LINE for phase in phases.values())
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CorruptRecord(f"{path}: its metadata does not say where tensors begin") from error
    if not sane:
        raise CorruptRecord(f"{path}: its metadata does not say where tensors begin")
    return phases


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise TransferFailed(f"{path} cannot be read: {error.strerror}", errno=error.errno) from error


def _files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if not index.is_file():
        found = sorted(folder.glob("*.safetensors"))
        if not found:
            raise UnsupportedModel(f"{folder} holds no weights: there is no *.safetensors in it")
        return found
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CorruptRecord(f"{index} does not say which files hold the weights; fetch it again") from error
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise CorruptRecord(f"{index} names {outside[0]!r}, which is no file of its own folder")
    return [folder / name for name in names]
