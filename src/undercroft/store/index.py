"""The index of a record file: what lies where, checked before it is believed.

It knows the JSON text and its rules (`docs/disk-format.md`); not the data file's bytes, nor caches.
Invariant: an index that `parse` returned describes records that are aligned, disjoint, inside
`data_nbytes`, uniquely keyed, and as long as their dtype and shape say, whoever wrote the text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, cast

from undercroft.errors import CorruptRecord, WrongVersion
from undercroft.store.ranges import BLOCK
from undercroft.store.record import DTYPES, MOST_DIMENSIONS, Record

FORMAT = "undercroft-records"
VERSION = 1
_LARGEST = 2**63 - 1


def index_path(path: str | os.PathLike[str]) -> Path:
    """Where the index of a data file lies: beside it, with ``.json`` added."""
    return Path(f"{os.fspath(path)}.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordIndex:
    """The content of an index file.

    Attributes:
        records: in the order of their offsets.
        data_nbytes: size of the data file.
        metadata: anything the writer wanted to say about the whole.
    """

    records: tuple[Record, ...]
    data_nbytes: int
    metadata: Mapping[str, Any]

    def text(self) -> str:
        """The JSON text that `parse` reads."""
        head = {
            "format": FORMAT,
            "version": VERSION,
            "data_nbytes": self.data_nbytes,
            "metadata": self.metadata,
        }
        return json.dumps({**head, "records": [_entry(record) for record in self.records]})

    @staticmethod
    def parse(text: str | bytes, name: str) -> RecordIndex:
        """Read an index from anywhere, trusting nothing in it.

        Args:
            text: the JSON text.
            name: what errors call the index.

        Raises:
            WrongVersion: it was written by a version that this one cannot read.
            CorruptRecord: it is no index, or describes what cannot be.
        """
        whole = _object(_load(text, name), name)
        if whole.get("format") != FORMAT:
            raise CorruptRecord(f"{name} is no index of a record file: it does not say format {FORMAT!r}")
        version = whole.get("version")
        if not _is_count(version) or version != VERSION:
            raise WrongVersion(f"{name} has version {version!r}; this Undercroft reads version {VERSION}")
        entries = whole.get("records")
        if not isinstance(entries, list):
            raise CorruptRecord(f"{name}: records is no list")
        records = [
            _record(entry, f"{name}: record {n}") for n, entry in enumerate(cast(list[object], entries))
        ]
        size = _integer(whole, "data_nbytes", name)
        records.sort(key=lambda record: record.offset)
        _check_places(records, size, name)
        return RecordIndex(records=tuple(records), data_nbytes=size, metadata=_metadata(whole, name))


def _entry(record: Record) -> dict[str, Any]:
    return {
        "name": record.name,
        "kind": record.kind,
        "offset": record.offset,
        "nbytes": record.nbytes,
        "dtype": record.dtype,
        "shape": list(record.shape),
        "xxh3_64": f"{record.checksum:016x}",
        "metadata": record.metadata,
    }


def _load(text: str | bytes, name: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise CorruptRecord(f"{name} is no JSON that can be read: {error}") from error


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    whole = dict(pairs)
    if len(whole) < len(pairs):
        raise ValueError("an object names a member twice")
    return whole


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _record(entry: object, where: str) -> Record:
    fields = _object(entry, where)
    record = Record(
        name=_text(fields, "name", where),
        kind=_text(fields, "kind", where),
        offset=_integer(fields, "offset", where),
        nbytes=_integer(fields, "nbytes", where),
        dtype=_text(fields, "dtype", where),
        shape=_shape(fields, where),
        checksum=_checksum(fields, where),
        metadata=_metadata(fields, where),
    )
    _check_size(record, where)
    return record


def _object(value: object, where: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise CorruptRecord(f"{where} is no JSON object")
    return cast(dict[str, object], value)


def _metadata(fields: dict[str, object], where: str) -> dict[str, object]:
    return _object(fields.get("metadata", {}), f"{where}: metadata")


def _text(fields: dict[str, object], field: str, where: str) -> str:
    value = fields.get(field)
    if not isinstance(value, str) or not value:
        raise CorruptRecord(f"{where}: {field} is no text, or an empty one")
    return value


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def _integer(fields: dict[str, object], field: str, where: str) -> int:
    value = fields.get(field)
    if not _is_count(value):
        raise CorruptRecord(f"{where}: {field} is no whole number from 0 to 2**63 - 1")
    return cast(int, value)


def _shape(fields: dict[str, object], where: str) -> tuple[int, ...]:
    value = fields.get("shape")
    axes = cast(list[object], value) if isinstance(value, list) else None
    if axes is None or len(axes) > MOST_DIMENSIONS or not all(map(_is_count, axes)):
        raise CorruptRecord(f"{where}: shape is no list of at most {MOST_DIMENSIONS} whole numbers")
    return tuple(cast(list[int], axes))


def _checksum(fields: dict[str, object], where: str) -> int:
    text = _text(fields, "xxh3_64", where)
    if len(text) != 16 or not set(text) <= set("0123456789abcdef"):
        raise CorruptRecord(f"{where}: xxh3_64 is not 16 lower-case hexadecimal digits")
    return int(text, 16)


def _check_size(record: Record, where: str) -> None:
    if record.dtype not in DTYPES:
        raise CorruptRecord(f"{where}: no dtype is called {record.dtype!r}")
    if not record.can_be():
        raise CorruptRecord(
            f"{where}: {record.nbytes} bytes cannot be {record.dtype} of shape {record.shape}"
        )


def _check_places(in_order: Sequence[Record], data_nbytes: int, name: str) -> None:
    for record in in_order:
        if record.offset % BLOCK:
            raise CorruptRecord(f"{name}: {record.key} begins at {record.offset}, no multiple of {BLOCK}")
        if record.end > data_nbytes:
            raise CorruptRecord(
                f"{name}: {record.key} ends at {record.end}, past the data's {data_nbytes} bytes"
            )
    for before, record in pairwise(in_order):
        if record.offset < before.end:
            raise CorruptRecord(f"{name}: {record.key} overlaps {before.key}")
    if len({record.key for record in in_order}) < len(in_order):
        raise CorruptRecord(f"{name} names a record twice")
