"""Writes a record file: a data file and, last, its index.

It knows the order in which the two become visible; not models or caches. Invariants: an index exists under
its final name only when every byte that it describes is on the disk; the memory held is one buffer,
whatever the records' sizes; a writer that fails leaves nothing behind.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import xxhash

from undercroft.errors import InvalidInput, SpillMisuse
from undercroft.store.budget import Budget
from undercroft.store.disk import Syscalls
from undercroft.store.index import RecordIndex, index_path
from undercroft.store.partial import PartialFile
from undercroft.store.record import DTYPES, Key, Record
from undercroft.units import MIB

Data = torch.Tensor | bytes | bytearray | memoryview
_BUFFER = 4 * MIB
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class RecordWriter:
    """A context manager that writes one record file; leaving it without an error publishes the file.

    Args:
        path: the data file; the index gets ``.json`` added. A record file is never replaced.
        metadata: what to say about the whole; JSON.
        budget: where the buffer of 4 MiB is reserved.
        syscalls: the seam for doubles.

    Raises:
        InvalidInput: a record file of that name exists, or the metadata is no JSON.
        SpillMisuse: another writer is at work on it.
        TierFull, TransferFailed: the file cannot be created; on leaving, that it cannot be published.
        BudgetExceeded: no room for the buffer.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        metadata: Mapping[str, Any] | None = None,
        budget: Budget | None = None,
        syscalls: Syscalls | None = None,
    ) -> None:
        self.path = Path(path)
        self._metadata = _json_copy(metadata)
        self._syscalls = syscalls
        self._records: dict[Key, Record] = {}
        self._failure: BaseException | None = None
        self._reservation = (budget or Budget()).reserve("host", _BUFFER, "record writer")
        self._buffer = mmap.mmap(-1, _BUFFER)
        try:
            self._data: PartialFile | None = self._open(self.path)
        except BaseException:
            self._free_buffer()
            raise

    def add(
        self,
        name: str,
        kind: str,
        *parts: Data,
        dtype: str | None = None,
        shape: Sequence[int] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Record:
        """Append one record.

        Args:
            name: which weights.
            kind: which form of them; the two together must be new.
            parts: contiguous CPU tensors or bytes, stored one after another.
            dtype: a name in `DTYPES`; by default that of the only tensor, else "uint8".
            shape: elements along each axis; by default those of the only tensor, else all bytes on one axis.
            metadata: what to say about the record; JSON.

        Raises:
            InvalidInput: no content, a key used already, a dtype and shape that do not fit, other parts.
            TierFull, TransferFailed: the disk took the bytes not; no file will be published.
            SpillMisuse: the writer is closed, or failed before.
        """
        data = self._writable()
        blocks = [_bytes(part) for part in parts]
        nbytes = sum(len(block) for block in blocks)
        own_dtype, own_shape = _type(parts, nbytes)
        record = Record(
            name=name,
            kind=kind,
            offset=data.nbytes,
            nbytes=nbytes,
            dtype=dtype or own_dtype,
            shape=own_shape if shape is None else tuple(map(int, shape)),
            checksum=_checksum(blocks),
            metadata=_json_copy(metadata),
        )
        self._check(record)
        self._append(data, blocks)
        self._records[record.key] = record
        return record

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        data, self._data = self._data, None
        try:
            if data is not None:
                self._leave(data, error)
        finally:
            self._free_buffer()

    def _leave(self, data: PartialFile, error: BaseException | None) -> None:
        try:
            if error is None and self._failure is not None:
                raise SpillMisuse(f"{self.path} was not written: an earlier record failed") from self._failure
            if error is None:
                self._publish(data)
                data.close()
        finally:
            data.discard()

    def _publish(self, data: PartialFile) -> None:
        data.finish()
        index = PartialFile(index_path(self.path), self._buffer, syscalls=self._syscalls)
        try:
            index.append(memoryview(self._text(data).encode()))
            index.finish()
            data.publish()
            index.publish()
            index.close()
        finally:
            index.discard()

    def _text(self, data: PartialFile) -> str:
        records = tuple(self._records.values())
        return RecordIndex(records=records, data_nbytes=data.nbytes, metadata=self._metadata).text()

    def _open(self, path: Path) -> PartialFile:
        data = PartialFile(path, self._buffer, syscalls=self._syscalls)
        existing = [each for each in (path, index_path(path)) if each.exists()]
        if existing:  # asked while we hold the lock
            data.discard()
            raise InvalidInput(
                f"{existing[0]} exists, and is never replaced; remove it, or choose another name"
            )
        return data

    def _free_buffer(self) -> None:
        self._buffer.close()
        self._reservation.release()

    def _writable(self) -> PartialFile:
        if self._data is None or self._failure is not None:
            raise SpillMisuse(f"the writer of {self.path} is closed, or failed before; make a new one")
        return self._data

    def _check(self, record: Record) -> None:
        if not record.name or not record.kind:
            raise InvalidInput("a record needs a name and a kind")
        if record.key in self._records:
            raise InvalidInput(f"{self.path} has a record {tuple(record.key)} already")
        if record.dtype not in DTYPES:
            raise InvalidInput(
                f"no dtype of the format is called {record.dtype!r}; there are {', '.join(DTYPES)}"
            )
        if not record.can_be():
            raise InvalidInput(
                f"record {tuple(record.key)}: {record.nbytes} bytes are no {record.dtype} of {record.shape}"
            )

    def _append(self, data: PartialFile, blocks: Sequence[memoryview]) -> None:
        try:
            for block in blocks:
                data.append(block)
            data.pad()
        except BaseException as error:
            self._failure = error
            raise


def _bytes(part: Data) -> memoryview:
    if not isinstance(part, torch.Tensor):
        view = memoryview(part)
        if not view.contiguous:
            raise InvalidInput("these bytes are not contiguous; copy them first")
        return view.cast("B")
    if part.device.type != "cpu" or not part.is_contiguous() or part.is_conj() or part.is_neg():
        raise InvalidInput("only contiguous CPU tensors are written; call .cpu().contiguous() first")
    return part.detach().reshape(-1).view(torch.uint8).numpy().data


def _type(parts: Sequence[Data], nbytes: int) -> tuple[str, tuple[int, ...]]:
    only = parts[0] if len(parts) == 1 else None
    if isinstance(only, torch.Tensor):
        return _NAMES.get(only.dtype, str(only.dtype)), tuple(only.shape)
    return "uint8", (nbytes,)


def _checksum(blocks: Sequence[memoryview]) -> int:
    running = xxhash.xxh3_64()
    for block in blocks:
        running.update(block)
    return running.intdigest()


def _json_copy(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a reader will get, so that what is no JSON is refused before a byte is written."""
    try:
        return json.loads(json.dumps(dict(metadata or {}), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInput(f"metadata must be JSON: {error}") from error
