"""GPUDirect Storage: moves between the disk and a GPU's memory without a copy in RAM.

It stands at the seam of `Syscalls`, so that files, transfers and queues stay what they are; host memory goes the usual
way. It needs kvikio, which is imported when the first one is made. Whole blocks of 4096 bytes are moved here too: what
else they hold lies in the same segment of PyTorch's allocator, whose segments are of 2 MiB.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Sequence
from typing import Any

import torch

from undercroft.errors import InvalidInput, SpillMisuse
from undercroft.store.budget import Budget
from undercroft.store.disk import Iovec, Syscalls
from undercroft.store.ranges import BLOCK, round_up
from undercroft.store.slab import Claim, Lease

_MEMORY_TYPE, _DEVICE = 2, 2  # CU_POINTER_ATTRIBUTE_MEMORY_TYPE, CU_MEMORYTYPE_DEVICE


class DeviceBytes:
    """Bytes of a GPU's memory, as torch and kvikio take them. It does not keep them alive.

    Args:
        address: where they are.
        nbytes: how many.
    """

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


class GdsSyscalls(Syscalls):
    """The system calls; those on a GPU's memory go through cuFile.

    Args:
        device: the GPU whose context is current during a move.

    Raises:
        InvalidInput: kvikio is not installed, or does not load.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        try:
            import kvikio  # pyright: ignore

            self._cuda = ctypes.CDLL("libcuda.so.1")
        except (ImportError, OSError) as error:
            raise InvalidInput(
                f"GPUDirect Storage needs kvikio (pip install 'undercroft[gpu]') and a GPU's driver: {error}"
            ) from error
        self._open: Any = kvikio.CuFile
        self._device = device
        self._lock = threading.Lock()
        self._files: dict[int, Any] = {}

    def preadv(self, fd: int, iovecs: Sequence[Iovec], offset: int) -> int:
        """As `Syscalls.preadv`; of memory on the GPU, the first range only."""
        if not self._is_on_gpu(iovecs[0][0]):
            return super().preadv(fd, iovecs, offset)
        return self._move("raw_read", fd, iovecs[0], offset)

    def pwritev(self, fd: int, iovecs: Sequence[Iovec], offset: int) -> int:
        """As `Syscalls.pwritev`; of memory on the GPU, the first range only."""
        if not self._is_on_gpu(iovecs[0][0]):
            return super().pwritev(fd, iovecs, offset)
        return self._move("raw_write", fd, iovecs[0], offset)

    def close(self, fd: int) -> None:
        """Close the descriptor, and cuFile's own for the same file, which would keep its blocks."""
        with self._lock:
            file = self._files.pop(fd, None)
        if file is not None:
            file.close()
        super().close(fd)

    def _move(self, call: str, fd: int, memory: Iovec, offset: int) -> int:
        torch.cuda.set_device(self._device)
        address, nbytes = memory
        try:
            return getattr(self._file(fd), call)(DeviceBytes(address, nbytes), nbytes, offset)
        except RuntimeError as error:  # what kvikio makes of any failure
            raise OSError(errno.EIO, str(error)) from error

    def _file(self, fd: int) -> Any:
        with self._lock:
            if fd not in self._files:
                self._files[fd] = self._open(f"/proc/{os.getpid()}/fd/{fd}", "r+")
            return self._files[fd]

    def _is_on_gpu(self, address: int) -> bool:
        kind = ctypes.c_uint()
        failed = self._cuda.cuPointerGetAttribute(ctypes.byref(kind), _MEMORY_TYPE, ctypes.c_void_p(address))
        return not failed and kind.value == _DEVICE


class DeviceBlocks:
    """Leases of a GPU's memory, aligned to the blocks of a disk.

    Args:
        budget: where leased bytes are reserved, in its tier "device".
        holder: the name they are reserved under.
        stream: the one on which what arrived is used. A block that other streams freed might still be written by
            work in their order, which a disk does not wait for.
    """

    def __init__(self, budget: Budget, holder: str, stream: torch.cuda.Stream) -> None:
        self._budget, self._holder, self._stream = budget, holder, stream
        self._closed = False

    @property
    def leased(self) -> int:
        """Bytes in live leases."""
        return self._budget.holders("device").get(self._holder, 0)

    def lease(self, nbytes: int) -> Lease | None:
        """Room for `nbytes`, or None where the budget has none at this moment.

        Raises:
            SpillMisuse: it is closed.
        """
        if self._closed:
            raise SpillMisuse("these blocks are closed")
        length = round_up(nbytes)
        reservation = self._budget.try_reserve("device", length + BLOCK, self._holder)
        if reservation is None:
            return None
        with torch.cuda.stream(self._stream):
            memory = torch.empty(length + BLOCK, dtype=torch.uint8, device=self._stream.device)
        return Lease(Claim(round_up(memory.data_ptr()), length, memory, reservation.release))

    def trim(self) -> int:
        """Nothing waits here: PyTorch's allocator has what no lease touches."""
        return 0

    def close(self) -> None:
        """Lease no more."""
        self._closed = True
