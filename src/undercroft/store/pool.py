"""A caching allocator for PyTorch's CPU tensors: built on first use, installed once, process-wide.

It knows how to load and steer `pool.cpp`, which says why it exists. Without a C++ compiler there is no pool and
everything else works, with a larger process and more CPU. Invariant: nothing is loaded that another user could have
written.
"""

from __future__ import annotations

import ctypes
import logging
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from undercroft import native

SMALLEST = 1024**2
"""Bytes of the smallest tensor that comes from the pool, at the start of a page."""

_SOURCE = Path(__file__).with_suffix(".cpp")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolUse:
    """Bytes of CPU tensors of 1 MiB and more: in use, waiting for reuse, and the most in use since the last look."""

    used: int
    waiting: int
    peak: int


class Pool:
    """The installed allocator.

    Args:
        library: the compiled `pool.cpp`.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.undercroft_pool_trim.argtypes = (ctypes.c_size_t,)
        library.undercroft_pool_trim.restype = ctypes.c_size_t
        library.undercroft_pool_install()

    def trim(self, keep: int = 0) -> int:
        """Give waiting blocks back to the system until at most `keep` bytes wait; returns their bytes."""
        return self._library.undercroft_pool_trim(keep)

    def trim_to_peak(self) -> int:
        """Give back what was not needed even when the most was in use since the last look; returns its bytes."""
        use = self.use()
        return self.trim(max(0, use.peak - use.used))

    def use(self) -> PoolUse:
        """What tensors occupy now."""
        numbers = (ctypes.c_uint64 * 3)()
        self._library.undercroft_pool_read(numbers)
        return PoolUse(used=numbers[0], waiting=numbers[1], peak=numbers[2])


@cache
def install() -> Pool | None:
    """The pool, in front of PyTorch's CPU allocator from now on; None where it cannot be built.

    The first call on a machine compiles it, in about ten seconds; later ones load what is in Undercroft's home.
    """
    try:
        pool = Pool(ctypes.CDLL(str(library())))
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning(
            "no tensor pool (%s): spilling works, but leaves more freed memory in the process", error
        )
        return None
    return pool


def library() -> Path:
    """Where the compiled pool lies, compiled first if need be.

    Raises:
        OSError: there is no compiler, it failed, or another user could have written the result.
    """
    home = Path(torch.__file__).parent
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    return native.library(
        _SOURCE,
        flags=("-O2", abi),
        places=(f"-I{home / 'include'}", f"-L{home / 'lib'}", "-lc10"),
        made_for=torch.__version__,
    )
