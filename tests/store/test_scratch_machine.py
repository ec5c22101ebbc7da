"""Any order of calls on scratch, slab, budget and queue: equal bytes, the budget held, nothing left."""

import ctypes
import mmap
import os
import random
import shutil
import tempfile
import threading
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from undercroft.errors import TierFull
from undercroft.store.budget import Budget
from undercroft.store.scratch import Extent, Scratch
from undercroft.store.slab import Slab
from undercroft.store.transfer import Cancelled, Priority, Transfer, TransferQueue
from undercroft.units import KIB, MIB

BLOCK = 4096
PATIENCE = 30.0
LIMIT = 256 * KIB
"""Of the budget: small enough that reads must often do without room."""

sizes = st.one_of(st.integers(1, 3 * BLOCK), st.integers(1, 100_000))
shifts = st.one_of(st.sampled_from([0, 1, 64, BLOCK - 1]), st.integers(0, BLOCK - 1))


@dataclass(eq=False)
class Spilled:
    """An extent on its way to disk or there, and what it must hold."""

    content: bytes
    extent: Extent
    write: Transfer


@dataclass(eq=False)
class Copy:
    """Bytes read back, kept by a storage alone, and what they must be."""

    content: bytes
    storage: torch.UntypedStorage


@dataclass(eq=False)
class Reading:
    """A read on its way; the transfer alone keeps the memory until it has ended."""

    spilled: Spilled
    transfer: Transfer
    arrived: list[torch.UntypedStorage]


class ScratchMachine(RuleBasedStateMachine):
    """Every rule is a call that training makes, in an order it never would."""

    spilled = Bundle("spilled")
    readings = Bundle("readings")
    copies = Bundle("copies")

    @initialize(two_disks=st.booleans(), checksums=st.booleans(), workers=st.integers(1, 4))
    def open(self, two_disks: bool, checksums: bool, workers: int) -> None:
        self._before = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
        self._home = Path(tempfile.mkdtemp())
        directories = [self._home / name for name in ("ab" if two_disks else "a")]
        self.budget = Budget(host=LIMIT)
        self.slab = Slab(MIB, budget=self.budget, page=BLOCK)
        self.scratch = Scratch(
            directories, buffers=self.slab, capacity=2 * MIB, checksums=checksums, chunk=16 * KIB
        )
        self.queue = TransferQueue(workers=workers, max_queued=64)
        self.live: list[Spilled] = []
        self.begun: list[Reading] = []
        self.copied: list[Copy] = []

    @rule(target=spilled, nbytes=sizes, shift=shifts, seed=st.integers(0, 255), cancel=st.booleans())
    def spill(self, nbytes: int, shift: int, seed: int, cancel: bool):
        content = random.Random(seed).randbytes(nbytes)
        memory = mmap.mmap(-1, shift + nbytes)
        memory[shift:] = content
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + shift
        try:
            extent, write = self.scratch.spill(address, nbytes, keep=memory)
        except TierFull:
            return multiple()
        del memory  # the transfer alone keeps it
        self.queue.submit(write, Priority.WRITE)
        if cancel:
            self.queue.cancel(write)
        self.live.append(Spilled(content, extent, write))
        return self.live[-1]

    @rule(target=readings, spilled=spilled, priority=st.sampled_from([Priority.DEMAND, Priority.PREFETCH]))
    def fetch(self, spilled: Spilled, priority: Priority):
        if not self._is_on_disk(spilled):
            return multiple()
        arrived: list[torch.UntypedStorage] = []

        def done(ended: Transfer) -> None:
            if ended.error is None:
                arrived.append(lease.storage(spilled.extent.head, spilled.extent.nbytes))

        fetched = self.scratch.fetch(spilled.extent, on_done=done)
        if fetched is None:
            return multiple()
        lease, transfer = fetched
        self.queue.submit(transfer, priority)
        self.begun.append(Reading(spilled, transfer, arrived))
        return self.begun[-1]

    @rule(reading=readings)
    def promote(self, reading: Reading) -> None:
        self.queue.promote(reading.transfer, Priority.DEMAND)

    @rule(reading=readings)
    def cancel(self, reading: Reading) -> None:
        self.queue.cancel(reading.transfer)

    @rule(target=copies, reading=consumes(readings))
    def arrive(self, reading: Reading):
        reading.transfer.settle()
        assert reading.transfer.error is None or isinstance(reading.transfer.error, Cancelled)
        if not reading.arrived:
            return multiple()
        self.copied.append(Copy(reading.spilled.content, reading.arrived.pop()))
        return self.copied[-1]

    @rule(copy=consumes(copies))
    def let_go(self, copy: Copy) -> None:
        self.copied.remove(copy)
        copy.storage = torch.UntypedStorage(0)

    @rule(spilled=consumes(spilled))
    def drop(self, spilled: Spilled) -> None:
        if self._is_on_disk(spilled):
            self.queue.drain(PATIENCE)  # no read of it may be under way
            self.scratch.drop(spilled.extent)
        self.live.remove(spilled)

    @rule()
    def trim_memory(self) -> None:
        self.slab.trim()

    @rule()
    def trim_disk(self) -> None:
        self.scratch.trim()

    @invariant()
    def bytes_in_memory_are_equal(self) -> None:
        for copy in getattr(self, "copied", ()):
            assert ctypes.string_at(copy.storage.data_ptr(), len(copy.content)) == copy.content

    @invariant()
    def the_budget_holds(self) -> None:
        if hasattr(self, "budget"):
            assert self.budget.peak("host") <= LIMIT
            assert self.slab.leased <= self.slab.committed == self.budget.held("host")

    @invariant()
    def extents_do_not_overlap(self) -> None:
        places = sorted(
            (piece.file, piece.offset, piece.offset + piece.nbytes)
            for spilled in getattr(self, "live", ())
            if self._is_on_disk(spilled)
            for piece in spilled.extent.pieces
        )
        for (file, _, end), (next_file, start, _) in pairwise(places):
            assert file != next_file or end <= start
        if places:
            assert sum(end - start for _, start, end in places) == self.scratch.occupied
            assert self.scratch.file_nbytes <= 2 * MIB

    def teardown(self) -> None:
        if not hasattr(self, "queue"):
            return
        for spilled in self.live:
            if self._is_on_disk(spilled):
                self._check_on_disk(spilled)
        self.queue.close(PATIENCE)
        self.scratch.close()
        self.slab.close()
        self.bytes_in_memory_are_equal()
        self._let_everything_go()
        self._check_nothing_is_left()

    def _is_on_disk(self, spilled: Spilled) -> bool:
        spilled.write.settle()
        return spilled.write.error is None

    def _check_on_disk(self, spilled: Spilled) -> None:
        fetched = self.scratch.fetch(spilled.extent)
        if fetched is None:  # copies in memory take all the room
            return
        lease, transfer = fetched
        assert self.queue.submit(transfer, Priority.DEMAND).wait(PATIENCE)
        found = ctypes.string_at(lease.address + spilled.extent.head, spilled.extent.nbytes)
        assert found == spilled.content

    def _let_everything_go(self) -> None:
        for reading in self.begun:
            reading.arrived.clear()
        for copy in self.copied:
            copy.storage = torch.UntypedStorage(0)
        del self.queue, self.scratch, self.slab

    def _check_nothing_is_left(self) -> None:
        threads, descriptors = self._before
        assert self.budget.held("host") == 0
        assert [path for path in self._home.rglob("*") if path.parent != self._home] == []
        assert set(threading.enumerate()) <= threads
        assert len(os.listdir("/proc/self/fd")) <= descriptors
        shutil.rmtree(self._home)


ScratchMachine.TestCase.settings = settings(
    max_examples=30,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
test_any_order_of_calls = ScratchMachine.TestCase
