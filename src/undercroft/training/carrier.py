"""How the bytes of a storage get between their device and memory that a disk can reach.

It knows devices, streams and pinned memory; not entries, budgets or when. Host memory needs no carrying: the disk
writes it where it lies and reads into leased memory that becomes the storage. CUDA memory is copied on a stream of its
own through a ring of pinned memory, or moved from where it lies by GPUDirect Storage. Invariant: memory that a copy
still reads or writes is kept alive and not reused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from undercroft.errors import UndercroftError
from undercroft.store.budget import Budget, Tier
from undercroft.store.gds import DeviceBlocks, DeviceBytes
from undercroft.store.slab import Lease, Lender, Slab


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    """Bytes ready, or about to be ready, for a disk to write.

    Attributes:
        address: where they lie in host memory.
        keep: what must live until they are written.
        before: to be called before they are read: waits for the copy, and sees that the storage was not resized.
    """

    address: int
    keep: object
    before: Callable[[], None]


class Resized(UndercroftError):
    """The owner of a storage took its bytes away before they were written."""


class Carrier(Protocol):
    """What carries the bytes of one kind of device."""

    tier: Tier
    buffers: Lender

    def mark(self) -> Any:
        """A mark in the device's order of work: what was submitted so far fills the tensor being saved."""
        ...

    def send(self, storage: torch.UntypedStorage, mark: Any) -> Parcel | None:
        """Bring a storage's bytes to where a disk can write them; None where there is no room for that now."""
        ...

    def receive(self, lease: Lease, head: int, nbytes: int) -> torch.UntypedStorage:
        """A storage on the device with the bytes of a lease from `head` on. Returns when the lease may be reused."""
        ...

    def hand_out(self, storage: torch.UntypedStorage) -> None:
        """Called before a storage that was received is used on the present stream."""
        ...


class HostCarrier:
    """For host memory: nothing is copied."""

    tier: Tier = "host"

    def __init__(self, buffers: Lender) -> None:
        self.buffers = buffers

    def mark(self) -> None:
        """Host memory is filled when it is saved."""

    def send(self, storage: torch.UntypedStorage, mark: None) -> Parcel:
        """The storage itself, where it lies."""
        return Parcel(address=storage.data_ptr(), keep=storage, before=_size_check(storage))

    def receive(self, lease: Lease, head: int, nbytes: int) -> torch.UntypedStorage:
        """The lease itself: its bytes return when the last view of the storage dies."""
        return lease.storage(head, nbytes)

    def hand_out(self, storage: torch.UntypedStorage) -> None:
        """Nothing to order."""


class Mark(Protocol):
    """A point in the order of a device's work."""

    def synchronize(self) -> None:
        """Let the CPU wait until it is passed."""
        ...


class Copying:
    """What a copy under way reads and writes: the last to let go of it waits until the copy is done.

    A write that is cancelled before it began has nobody else who waits, and its part of the ring would be read into
    while the copy still writes there.

    Args:
        copied: the end of the copy.
        memory: that it reads and writes.
    """

    __slots__ = ("_copied", "_memory")

    def __init__(self, copied: Mark, *memory: object) -> None:
        self._copied, self._memory = copied, memory

    def __del__(self) -> None:
        self._copied.synchronize()


class CudaCarrier:
    """For the memory of one GPU: copies on a side stream, through a ring of memory pinned once.

    Args:
        device: the GPU.
        ring: the pinned memory, at least as large as the largest storage.
    """

    tier: Tier = "device"

    def __init__(self, device: torch.device, ring: Slab) -> None:
        self.buffers: Lender = ring
        self._device = device
        ring.register_cuda(device)
        self._out, self._in = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def mark(self) -> torch.cuda.Event:
        """An event on the stream that computes the tensor."""
        return _now(self._device)

    def send(self, storage: torch.UntypedStorage, mark: torch.cuda.Event) -> Parcel | None:
        """Begin the copy into the ring. The storage is kept until it is written, so the allocator cannot reuse it."""
        lease = self.buffers.lease(storage.nbytes())
        if lease is None:
            return None
        with torch.cuda.device(self._device), torch.cuda.stream(self._out):
            self._out.wait_event(mark)
            _bytes(lease.storage(0, storage.nbytes())).copy_(_bytes(storage), non_blocking=True)
            copied = _now(self._device)
        check_size = _size_check(storage)

        def before() -> None:
            copied.synchronize()
            check_size()

        return Parcel(address=lease.address, keep=Copying(copied, lease, storage), before=before)

    def receive(self, lease: Lease, head: int, nbytes: int) -> torch.UntypedStorage:
        """Copy to the device and wait for it: this runs on an I/O thread, beside the computation."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._in):
            arrived = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
            arrived.copy_(_bytes(lease.storage(head, nbytes)), non_blocking=True)
            _now(self._device).synchronize()
        return arrived.untyped_storage()

    def hand_out(self, storage: torch.UntypedStorage) -> None:
        """Keep the allocator from reusing the memory while the present stream may read it."""
        _use_now(storage, self._device)


class GdsCarrier:
    """For the memory of one GPU whose disk reads and writes it directly, through a `Scratch` over `GdsSyscalls`.

    Args:
        device: the GPU.
        budget: where the blocks that a read arrives in are reserved, beside the storage that they are copied to.
    """

    tier: Tier = "device"

    def __init__(self, device: torch.device, budget: Budget) -> None:
        self._device = device
        self._in = torch.cuda.Stream(device)
        self.buffers: Lender = DeviceBlocks(budget, "read buffers", self._in)

    def mark(self) -> torch.cuda.Event:
        """An event on the stream that computes the tensor."""
        return _now(self._device)

    def send(self, storage: torch.UntypedStorage, mark: torch.cuda.Event) -> Parcel:
        """Let the disk take the bytes where they lie, once they are computed."""
        check_size = _size_check(storage)

        def before() -> None:
            mark.synchronize()
            check_size()

        return Parcel(address=storage.data_ptr(), keep=storage, before=before)

    def receive(self, lease: Lease, head: int, nbytes: int) -> torch.UntypedStorage:
        """Copy from the blocks to a storage of the exact size, and wait for it: this runs on an I/O thread."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._in):
            blocks = torch.as_tensor(DeviceBytes(lease.address + head, nbytes), device=self._device)
            arrived = blocks.clone()
            _now(self._device).synchronize()
        return arrived.untyped_storage()

    def hand_out(self, storage: torch.UntypedStorage) -> None:
        """Keep the allocator from reusing the memory while the present stream may read it."""
        _use_now(storage, self._device)


def _now(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _use_now(storage: torch.UntypedStorage, device: torch.device) -> None:
    _bytes(storage).record_stream(torch.cuda.current_stream(device))


def _size_check(storage: torch.UntypedStorage) -> Callable[[], None]:
    nbytes = storage.nbytes()

    def check() -> None:
        if storage.nbytes() != nbytes:
            raise Resized("the storage was resized")

    return check


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # pyright: ignore
