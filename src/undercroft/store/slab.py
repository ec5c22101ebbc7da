"""The RAM arena: one anonymous mapping that hands out page-aligned leases.

It knows addresses and budgets, not what the bytes mean. The mapping asks for huge pages, is not inherited by forked
children and, where CUDA is present and asked for, is registered with it once. Invariants: the bytes of a lease return
when the last view of it dies, never earlier; committed bytes (those that occupy RAM) are always reserved in the budget.

Why not `torch.empty`: its storages start 64 bytes into a page, which O_DIRECT refuses, and reading into huge pages
costs a quarter of the CPU of 4 KiB pages (`lab/LOG.md`).
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np
import torch

from undercroft.errors import BudgetExceeded, SpillMisuse
from undercroft.store.budget import Budget, Reservation, Tier
from undercroft.store.ranges import BLOCK, FreeRanges, round_up

HUGE_PAGE = 2 * 1024**2
_MADV_POPULATE_WRITE = 23  # Linux 5.14; not in the standard library's mmap
_MAP_NORESERVE = 0x4000


class Claim:
    """A use of some bytes, which ends when this object dies: with the last lease or storage that refers to it.

    NumPy takes it for an array's memory, and so keeps it as long as the array; that is done only for those
    bytes that become a storage, since an array costs more than everything else that a lease needs.
    """

    __slots__ = ("_on_end", "address", "memory", "nbytes")

    def __init__(self, address: int, nbytes: int, memory: object, on_end: Callable[[], None]) -> None:
        self.address, self.nbytes, self.memory, self._on_end = address, nbytes, memory, on_end

    def __del__(self) -> None:
        self._on_end()

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"data": (self.address, False), "shape": (self.nbytes,), "typestr": "|u1", "version": 3}


class Lease:
    """A pinned use of slab bytes. They return when this object and every storage made of it are gone.

    Attributes:
        address: where the bytes start, a multiple of 4096.
        nbytes: how many there are, a multiple of 4096.
    """

    __slots__ = ("__weakref__", "_claim", "_pinned", "address", "nbytes")

    def __init__(self, claim: Claim, pinned: Lease | None = None) -> None:
        self._claim, self._pinned = claim, pinned
        self.address, self.nbytes = claim.address, claim.nbytes

    @property
    def first(self) -> Lease:
        """The lease of the same bytes that is no pin of another."""
        return self._pinned or self

    def storage(self, offset: int, nbytes: int) -> torch.UntypedStorage:
        """A storage of exactly `nbytes` over the lease's bytes from `offset` on; it keeps the lease alive."""
        whole = torch.frombuffer(np.asarray(self._claim), dtype=torch.uint8, count=nbytes, offset=offset)
        return whole.untyped_storage()

    def pin(self, on_unpin: Callable[[], None]) -> Lease:
        """Another lease of the same bytes.

        Args:
            on_unpin: called when that lease and every storage made of it are gone, in the middle of any other
                call of any thread: it may take no lock.
        """
        return Lease(Claim(self.address, self.nbytes, self._claim, on_unpin), self.first)


class Lender(Protocol):
    """What hands out page-aligned memory under a budget: a slab, or blocks of the tensor pool."""

    @property
    def leased(self) -> int:
        """Bytes in live leases."""
        ...

    def lease(self, nbytes: int) -> Lease | None:
        """Room for `nbytes`, or None where there is none now."""
        ...

    def trim(self) -> int:
        """Give idle pages back to the system; returns their bytes."""
        ...

    def close(self) -> None:
        """Return the memory; leases still alive keep theirs."""
        ...


class Slab:
    """An arena of `capacity` bytes of address space.

    RAM is committed a page at a time as leases touch it, and stays committed for the next lease until `trim`.

    Args:
        capacity: bytes of address space, rounded up to a page.
        budget: where committed bytes are reserved; none means they are not limited.
        tier: the tier they are reserved in.
        holder: the name they are reserved under.
        prefault: commit everything now, so that no later lease can fail for lack of budget or wait for a page.
        page: bytes committed at once; the size of a huge page unless the budget is small.

    Raises:
        BudgetExceeded: `prefault` was asked for and the budget does not allow it.
    """

    def __init__(
        self,
        capacity: int,
        *,
        budget: Budget | None = None,
        tier: Tier = "host",
        holder: str = "slab",
        prefault: bool = False,
        page: int = HUGE_PAGE,
    ) -> None:
        self.capacity = round_up(capacity, page)
        self._page = page
        self._budget = budget or Budget()
        self._tier: Tier = tier
        self._holder = holder
        self._lock = threading.Lock()
        self._ranges = FreeRanges(self.capacity)
        self._returned: SimpleQueue[tuple[int, int]] = SimpleQueue()
        self._pages: dict[int, Reservation] = {}
        self._map = mmap.mmap(
            -1, self.capacity + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        )
        self._base = -_address(self._map) % page
        _advise(self._map)
        self._address = _address(self._map) + self._base
        self._bytes = memoryview(self._map)  # leases hold it: a mapping is not unmapped under a view
        self._registered: torch.device | None = None
        self._closed = False
        if prefault:
            self._prefault()

    @property
    def committed(self) -> int:
        """Bytes that occupy RAM."""
        with self._lock:
            return len(self._pages) * self._page

    @property
    def leased(self) -> int:
        """Bytes in live leases."""
        with self._lock:
            self._collect()
            return self.capacity - self._ranges.free

    def lease(self, nbytes: int) -> Lease | None:
        """Room for `nbytes` (at least 1), or None where the slab or the budget has none at this moment.

        Raises:
            SpillMisuse: the slab is closed.
        """
        with self._lock:
            if self._closed:
                raise SpillMisuse("this slab is closed; make a new one")
            self._collect()
            offset = self._ranges.take(nbytes)
            if offset is None:
                return None
            length = round_up(nbytes)
            if not self._commit(offset, length) and not (self._trim() and self._commit(offset, length)):
                self._ranges.give(offset, length)
                return None
            return self._hand_out(offset, length)

    def trim(self) -> int:
        """Give committed pages that no lease touches back to the system; returns their bytes."""
        with self._lock:
            self._collect()
            return self._trim()

    def register_cuda(self, device: torch.device) -> None:
        """Pin the whole slab for CUDA, once: `pin_memory()` would round every buffer up to a power of two.

        Args:
            device: a GPU that is used anyhow: to pin makes a context on one, which takes some of its memory.

        Raises:
            BudgetExceeded: not everything is committed yet and the budget does not allow it.
            RuntimeError: CUDA refused.
        """
        if self._registered:
            return
        self._prefault()
        with torch.cuda.device(device):
            _cuda_check(_cuda_runtime().cudaHostRegister(self._address, self.capacity, 0))
        self._registered = device

    def close(self) -> None:
        """Return the memory. Leases still alive keep theirs, and only theirs stays reserved, until they die."""
        self._closed = True
        self.trim()
        if self._registered:
            with torch.cuda.device(self._registered):
                _cuda_check(_cuda_runtime().cudaHostUnregister(self._address))
            self._registered = None
            self.trim()
        self._bytes = memoryview(b"")
        with suppress(BufferError):  # a live lease holds the mapping; the last one to die unmaps it
            self._map.close()

    def _hand_out(self, offset: int, length: int) -> Lease:
        on_end = partial(self._returned.put, (offset, length))
        return Lease(Claim(self._address + offset, length, self._bytes, on_end))

    def _collect(self) -> None:
        """Take back what died. Finalizers may run inside any call of ours, so they only fill a re-entrant queue."""
        while not self._returned.empty():
            self._ranges.give(*self._returned.get())

    def _commit(self, offset: int, length: int) -> bool:
        if len(self._pages) * self._page == self.capacity:
            return True
        first, end = offset // self._page, -(-(offset + length) // self._page)
        fresh = [page for page in range(first, end) if page not in self._pages]
        taken: dict[int, Reservation] = {}
        for page in fresh:
            reservation = self._budget.try_reserve(self._tier, self._page, self._holder)
            if reservation is None:
                for earlier in taken.values():
                    earlier.release()
                return False
            taken[page] = reservation
        self._pages.update(taken)
        return True

    def _trim(self) -> int:
        idle = [] if self._registered else self._idle_pages()
        for page in idle:
            self._map.madvise(mmap.MADV_DONTNEED, self._base + page * self._page, self._page)
            self._pages.pop(page).release()
        return len(idle) * self._page

    def _idle_pages(self) -> list[int]:
        """Committed pages that no lease touches."""
        return [
            page
            for start, length in self._ranges.free_ranges()
            for page in range(-(-start // self._page), (start + length) // self._page)
            if page in self._pages
        ]

    def _prefault(self) -> None:
        with self._lock:
            if not self._commit(0, self.capacity):
                held = self._budget.holders(self._tier)
                raise BudgetExceeded(
                    self.capacity, self._budget.limit(self._tier) or 0, held, tier=self._tier
                )
            for start in range(0, self.capacity, 64 * HUGE_PAGE):
                _populate(self._map, self._base + start, min(64 * HUGE_PAGE, self.capacity - start))


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # pyright: ignore


def _cuda_check(code: Any) -> None:
    torch.cuda.check_error(code)


def _address(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def _advise(mapping: mmap.mmap) -> None:
    mapping.madvise(mmap.MADV_DONTFORK)
    with suppress(OSError):  # a kernel built without huge pages
        mapping.madvise(mmap.MADV_HUGEPAGE)


def _populate(mapping: mmap.mmap, start: int, length: int) -> None:
    try:
        mapping.madvise(_MADV_POPULATE_WRITE, start, length)
    except OSError:  # a kernel before 5.14
        for offset in range(start, start + length, BLOCK):
            mapping[offset] = 0
