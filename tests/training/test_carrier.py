"""Memory between a device and a disk: it is not given away while a copy still reads or writes it."""

import os
import threading
from pathlib import Path

import pytest

from undercroft.store.disk import DiskFile
from undercroft.store.slab import Slab
from undercroft.store.transfer import Chunk, Priority, Transfer, TransferQueue
from undercroft.training.carrier import Copying
from undercroft.training.spill import _ring
from undercroft.units import MIB

BLOCK, PATIENCE = 4096, 30.0


class Late:
    """The end of a copy that is done when somebody says so."""

    def __init__(self) -> None:
        self.done, self.is_waited_for = threading.Event(), threading.Event()

    def synchronize(self) -> None:
        self.is_waited_for.set()
        assert self.done.wait(PATIENCE)


@pytest.mark.usefixtures("nothing_left")
def test_a_cancelled_write_keeps_the_memory_that_is_still_copied_to(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDWR | os.O_TMPFILE, 0o600)
    file, ring, copied, gate = DiskFile(fd, "a file", direct=False), Slab(BLOCK, page=BLOCK), Late(), Late()

    def write(**options: object) -> Transfer:
        return Transfer("write", [Chunk(file, 0, (memory,), BLOCK, memory)], **options)  # pyright: ignore

    lease = ring.lease(BLOCK)
    assert lease is not None
    memory = (lease.address, BLOCK)
    with TransferQueue(workers=1) as queue:
        first = queue.submit(write(before=gate.synchronize), Priority.WRITE)
        second = queue.submit(write(keep=Copying(copied, lease), before=copied.synchronize), Priority.WRITE)
        del lease
        assert gate.is_waited_for.wait(PATIENCE)
        queue.cancel(second)
        gate.done.set()
        first.settle()
        assert copied.is_waited_for.wait(PATIENCE)
        assert ring.leased == BLOCK
        copied.done.set()
        second.settle()
        assert ring.leased == 0
    os.close(fd)
    ring.close()


@pytest.mark.parametrize("budget", [1_000_000, 64 * MIB + 12_345])
def test_pinned_memory_keeps_within_a_budget_of_any_size(budget: int) -> None:
    ring = _ring(budget)
    assert 0.96 * budget < ring.committed == ring.capacity <= budget
    ring.close()
