"""What every question about the store is measured with: buffers, threads, a place on the disk.

Invariant: raw and stored bytes move through the same buffers, with as many system calls in flight.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from undercroft import machine
from undercroft.bench.raw import RawLoop
from undercroft.store.slab import Lease, Slab
from undercroft.store.transfer import TransferQueue
from undercroft.units import MIB

_BUFFERS = 64 * MIB


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing the store does, and the same done raw.

    Attributes:
        name: such as "reads of 8 MiB".
        enough: the share of the raw rate that is claimed.
        nbytes: bytes that one sample moves.
        direct: whether they bypass the page cache; otherwise nothing is said about the disk.
        ways: name → what moves them. "raw" is the yardstick, "store" and "checksums" are ours.
    """

    name: str
    enough: float
    nbytes: int
    direct: bool
    ways: dict[str, Callable[[], None]]


@dataclass(frozen=True, kw_only=True)
class Rig:
    """Shared by all cases.

    Attributes:
        place: an empty private directory.
        slab: committed buffers with random content, for a file system that compresses must not look fast.
        queue: the store's threads, for reads.
        writer: the store's threads for writes, one more, because writes never take the last.
        raw: as many threads without a store.
    """

    place: Path
    slab: Slab
    queue: TransferQueue
    writer: TransferQueue
    raw: RawLoop

    def buffers(self, nbytes: int) -> list[Lease]:
        """The whole slab in leases of `nbytes`."""
        leases = [self.slab.lease(nbytes) for _ in range(self.slab.capacity // nbytes)]
        return [lease for lease in leases if lease is not None]


@contextmanager
def set_up(directory: Path, *, depth: int) -> Generator[Rig]:
    """A rig whose files are gone when it is left.

    Args:
        directory: on the disk to measure.
        depth: I/O threads, of the store and without it.

    Raises:
        UnsafeDirectory: the directory is missing or cannot be looked at.
    """
    machine.disk(directory)
    slab = Slab(_BUFFERS, prefault=True)
    try:
        with (
            TemporaryDirectory(prefix="bench-", dir=directory) as place,
            TransferQueue(workers=depth) as queue,
            TransferQueue(workers=depth + 1) as writer,
            RawLoop(depth) as raw,
        ):
            rig = Rig(place=Path(place), slab=slab, queue=queue, writer=writer, raw=raw)
            _fill_with_noise(rig)
            yield rig
    finally:
        slab.close()


def _fill_with_noise(rig: Rig) -> None:
    for lease in rig.buffers(MIB):
        ctypes.memmove(lease.address, os.urandom(MIB), MIB)
