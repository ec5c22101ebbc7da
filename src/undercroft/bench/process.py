"""What a process uses: memory from /proc, CPU seconds and page faults from the kernel."""

from __future__ import annotations

import ctypes
import re
import resource
import time
from dataclasses import dataclass
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Seconds and counts since some moment; subtract two to get what lies between."""

    wall: float
    cpu: float
    system: float
    faults: int

    def __sub__(self, earlier: Usage) -> Usage:
        return Usage(
            wall=self.wall - earlier.wall,
            cpu=self.cpu - earlier.cpu,
            system=self.system - earlier.system,
            faults=self.faults - earlier.faults,
        )


def usage() -> Usage:
    """What this process, all its threads together, has used so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return Usage(
        wall=time.perf_counter(), cpu=used.ru_utime + used.ru_stime, system=used.ru_stime, faults=used.ru_minflt
    )


def resident() -> int:
    """Bytes of RAM this process occupies now."""
    return _status("VmRSS")


def peak_resident() -> int:
    """The most bytes of RAM it occupied since `forget_peak`."""
    return _status("VmHWM")


def forget_peak() -> None:
    """Begin a new peak at what is resident now."""
    _CLEAR_REFS.write_text("5")


def trim_heap() -> None:
    """Have glibc give the free pages of its heap back."""
    ctypes.CDLL(None).malloc_trim(0)


def _status(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024
