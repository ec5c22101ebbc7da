"""How long a read waits that is wanted now, behind many that will be: in a class of its own, or in the row."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from itertools import cycle, islice

from undercroft.bench.records import write_records
from undercroft.bench.rig import Rig
from undercroft.errors import TransferFailed
from undercroft.store.records import RecordFile
from undercroft.store.transfer import Priority, Transfer
from undercroft.units import MIB

_RECORD = 4 * MIB
_MOST_RECORDS = 128
_PATIENCE_SECONDS = 120.0

FIFO, URGENT = "first in, first out", "demand first"


@contextmanager
def demand(rig: Rig, queued: int) -> Generator[dict[str, Callable[[], float]]]:
    """Ways to read 4 MiB behind about `queued` bytes of prefetch; each returns the seconds it took.

    Raises:
        TierFull: no room for a file of 512 MiB, or `queued`.
    """
    ahead = max(queued // _RECORD, 1)
    path = write_records(rig.place / "demand", min(ahead, _MOST_RECORDS), _RECORD)
    with RecordFile.open(path, verify="never") as file:
        yield {
            FIFO: lambda: _wait_behind(rig, file, ahead, Priority.PREFETCH),
            URGENT: lambda: _wait_behind(rig, file, ahead, Priority.DEMAND),
        }


def _wait_behind(rig: Rig, file: RecordFile, ahead: int, priority: Priority) -> float:
    *queued, wanted = _reads(rig, file, ahead + 1)
    for transfer in queued:
        rig.queue.submit(transfer, Priority.PREFETCH)
    start = time.perf_counter()
    rig.queue.submit(wanted, priority).wait()
    seconds = time.perf_counter() - start
    for transfer in queued:
        rig.queue.cancel(transfer)
    if not rig.queue.drain(_PATIENCE_SECONDS):
        raise TransferFailed(
            f"reads of {_RECORD} bytes did not end within {_PATIENCE_SECONDS} s; check the disk"
        )
    return seconds


def _reads(rig: Rig, file: RecordFile, count: int) -> list[Transfer]:
    """Reads of the file's records, over and over, into buffers that are used over and over."""
    places = zip(cycle(file.values()), cycle(rig.buffers(_RECORD)), strict=False)
    return [
        Transfer("read", file.chunks([(record, buffer.address)]), keep=buffer)
        for record, buffer in islice(places, count)
    ]
