"""Requests of 8 MiB one after another: through a scratch, and with plain system calls to the same blocks."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from contextlib import closing, contextmanager

from undercroft.bench.rig import Case, Rig
from undercroft.store.disk import DiskFile
from undercroft.store.scratch import Extent, Scratch
from undercroft.store.slab import Lease
from undercroft.store.transfer import CHUNK, Priority, Transfer
from undercroft.units import MIB

_REQUEST = 8 * MIB
_ENOUGH = 0.90


@contextmanager
def sequential(rig: Rig, nbytes: int) -> Generator[tuple[Case, ...]]:
    """Reads and writes of about `nbytes` in all; every block was written once before.

    The system calls go to the scratch's own file: two files on one disk differ by up to 15 % (`lab/LOG.md`).

    "one call" is raw with a system call per request, not per chunk as the store cuts them.

    Raises:
        TierFull: two files of that size do not fit.
    """
    count = max(nbytes // _REQUEST, 1)
    total = count * _REQUEST
    with (
        closing(_Stored(rig, count, checksums=False)) as store,
        closing(_Stored(rig, count, checksums=True)) as checked,
    ):
        file = store.file

        def read(call: int) -> None:
            rig.raw.move("read", file.fd, total, call, rig.buffers(_REQUEST))

        def write(call: int) -> None:
            rig.raw.move("write", file.fd, total, call, rig.buffers(_REQUEST))

        ours = {"store": store, "checksums": checked}
        raw_reads = {"raw": lambda: read(CHUNK), "one call": lambda: read(_REQUEST)}
        raw_writes = {"raw": lambda: write(CHUNK), "one call": lambda: write(_REQUEST)}
        reads = {**raw_reads, **{name: each.read for name, each in ours.items()}}
        writes = {**raw_writes, **{name: each.write for name, each in ours.items()}}
        yield tuple(
            Case(
                name=f"sequential {name}, 8 MiB", enough=_ENOUGH, nbytes=total, direct=file.direct, ways=ways
            )
            for name, ways in (("reads", reads), ("writes", writes))
        )


class _Stored:
    """A scratch that holds the requests, written once."""

    def __init__(self, rig: Rig, count: int, *, checksums: bool) -> None:
        self._rig, self._count = rig, count
        self._scratch = Scratch([rig.place / "spill"], buffers=rig.slab, checksums=checksums)
        self._extents: list[Extent] = []
        self.write()

    @property
    def file(self) -> DiskFile:
        """Where the requests lie, one after another."""
        return self._scratch.files[0]

    def write(self) -> None:
        """Spill every request, into the room that the ones before had."""
        for extent in self._extents:
            self._scratch.drop(extent)
        buffers = self._rig.buffers(_REQUEST)
        flying: deque[Transfer] = deque()
        self._extents = []
        for number in range(self._count):
            if number >= len(buffers):
                flying.popleft().wait()
            buffer = buffers[number % len(buffers)]
            extent, transfer = self._scratch.spill(buffer.address, _REQUEST, keep=buffer)
            self._extents.append(extent)
            flying.append(self._rig.writer.submit(transfer, Priority.WRITE))
        for transfer in flying:
            transfer.wait()

    def read(self) -> None:
        """Fetch every request, and let go of each as soon as it is here."""
        flying: deque[tuple[Lease, Transfer]] = deque()
        for extent in self._extents:
            while (fetched := self._scratch.fetch(extent)) is None:
                flying.popleft()[1].wait()
            self._rig.queue.submit(fetched[1], Priority.DEMAND)
            flying.append(fetched)
        for _, transfer in flying:
            transfer.wait()

    def close(self) -> None:
        """Close the scratch, which frees its room."""
        self._scratch.close()
