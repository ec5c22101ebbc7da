"""What happens to the memory of freed tensors: made to be reused while warm, and given back when the peak is near.

glibc keeps what is freed for the next allocation. A freed activation then still occupies RAM: nothing seems to be
saved. Setting `mallopt`'s thresholds so low that every tensor is a mapping of its own gives memory back at once, but
each step then faults in all its pages anew, for a quarter more CPU (figures in `lab/LOG.md`). So large tensors come
from the pool, where there is one; elsewhere the thresholds are fixed high and the heap is trimmed at chosen moments.

What it sets is process-wide. With another C library and no compiler it does nothing.
"""

from __future__ import annotations

import ctypes
from functools import cache

from undercroft.store import pool

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 * 1024**2  # half of glibc's HEAP_MAX_SIZE; it refuses more
_NEVER_TRIM_BY_ITSELF = 2**31 - 1


@cache
def settle() -> bool:
    """Prepare the process for large tensors that come and go, best before the first of them.

    Returns:
        Whether freed memory can be given back.
    """
    if pool.install() is not None:
        return True
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        return False
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    libc.mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM_BY_ITSELF)
    return True


def trim() -> None:
    """Give all memory that no tensor uses back to the system."""
    if not settle():
        return
    installed = pool.install()
    if installed is not None:
        installed.trim()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


class Heap:
    """Gives freed memory back at the right moments of a step.

    With the pool these are few: what tensors need, they take from what waits, and the process grows only beyond that.

    Args:
        patience: without the pool, bytes freed before the next `trim_if_due` acts.
    """

    def __init__(self, patience: int) -> None:
        settle()
        self._patience = patience
        self._freed = 0
        self._pool = pool.install()

    def freed(self, nbytes: int) -> None:
        """Take note that a tensor of `nbytes` was let go. A lost update between threads only shifts the next trim."""
        self._freed += nbytes

    def trim_if_due(self) -> None:
        """Trim if enough was freed since the last time."""
        if self._freed > self._patience:
            self.trim()

    def trim(self) -> None:
        """Make the process smaller, for its peak is near; at most a few milliseconds."""
        self._freed = 0
        if self._pool is None:
            trim()

    def end_step(self) -> None:
        """Give back what the step did not need even at its peak."""
        if self._pool is not None:
            self._pool.trim_to_peak()

    def close(self) -> None:
        """Give back everything that no tensor uses."""
        trim()
