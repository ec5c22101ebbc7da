"""How the C library gives freed memory back: a process-wide setting that spilling depends on.

glibc keeps what is freed for the next allocation. Freed activations then stay in the process, and nothing seems to
be saved. It knows glibc only; elsewhere it does nothing.
"""

from __future__ import annotations

import ctypes


def return_freed_memory() -> None:
    """Give the free memory of the heap back to the system."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
