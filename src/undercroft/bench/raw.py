"""The yardstick for the store: threads that call preadv or pwritev, and nothing else.

It knows a descriptor, offsets and memory. Invariant: every byte asked for has moved when a call returns.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Literal, Self

from undercroft.errors import TransferFailed
from undercroft.store.slab import Lease


class RawLoop:
    """Threads that each take the next piece of a file and move it with one system call.

    Args:
        depth: threads, each with one call in flight.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._threads = ThreadPoolExecutor(depth, thread_name_prefix="undercroft-raw")

    def move(
        self, verb: Literal["read", "write"], fd: int, nbytes: int, call: int, buffers: Sequence[Lease]
    ) -> None:
        """Move a file's first `nbytes`, `call` bytes at a time, through buffers that are used over and over.

        Raises:
            TransferFailed: the file ended early, or the disk took only a part.
            OSError: the system refused.
        """
        memory = [_memory(lease, start, call) for lease in buffers for start in range(0, lease.nbytes, call)]
        pieces = iter([(offset, memory[n % len(memory)]) for n, offset in enumerate(range(0, nbytes, call))])
        workers = [self._threads.submit(_work, verb, fd, pieces) for _ in range(self._depth)]
        for worker in workers:
            worker.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown()


def _work(verb: Literal["read", "write"], fd: int, pieces: Iterator[tuple[int, memoryview]]) -> None:
    call = os.preadv if verb == "read" else os.pwritev
    for offset, memory in pieces:  # shared by the threads: each takes the next
        if call(fd, [memory], offset) != memory.nbytes:
            raise TransferFailed(f"the raw {verb} at {offset} moved only a part of {memory.nbytes} bytes")


def _memory(lease: Lease, start: int, nbytes: int) -> memoryview:
    return memoryview((ctypes.c_char * nbytes).from_address(lease.address + start)).cast("B")
