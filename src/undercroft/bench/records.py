"""Records read through a cache that keeps none of them for the next time, and with plain system calls."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path

from undercroft.bench.rig import Case, Rig
from undercroft.store.cache import RecordCache
from undercroft.store.disk import open_file
from undercroft.store.index import index_path
from undercroft.store.records import RecordFile
from undercroft.store.transfer import CHUNK
from undercroft.store.writer import RecordWriter
from undercroft.units import MIB, format_size


@contextmanager
def records(rig: Rig, nbytes: int, size: int) -> Generator[Case]:
    """Reads of about `nbytes` in records of `size` bytes, from one file.

    Raises:
        TierFull: the file does not fit.
    """
    count = max(nbytes // size, 1)
    path = write_records(rig.place / f"records-{size}", count, size)
    try:
        with (
            closing(open_file(str(path), os.O_RDONLY, name=str(path))) as file,
            RecordFile.open(path, verify="never") as trusted,
            RecordFile.open(path, verify="always") as checked,
        ):

            def raw() -> None:
                rig.raw.move("read", file.fd, count * size, min(size, CHUNK), rig.buffers(size))

            ways = {
                "raw": raw,
                "store": lambda: _read(rig, trusted),
                "checksums": lambda: _read(rig, checked),
            }
            enough = 0.85 if size >= 4 * MIB else 0.75
            name = f"records, {format_size(size)}"
            yield Case(name=name, enough=enough, nbytes=count * size, direct=file.direct, ways=ways)
    finally:
        path.unlink()
        index_path(path).unlink()


def write_records(path: Path, count: int, size: int) -> Path:
    """A record file of `count` records of `size` random bytes; returns its path."""
    noise = os.urandom(size)
    with RecordWriter(path) as writer:
        for number in range(count):
            writer.add(str(number), "bytes", noise)
    return path


def _read(rig: Rig, file: RecordFile) -> None:
    with RecordCache([file], rig.slab.capacity, rig.slab, rig.queue) as cache:
        for _, lease in cache.fetch(file):
            del lease
