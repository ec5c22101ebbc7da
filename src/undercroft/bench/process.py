"""What a process uses: memory and files from /proc, CPU seconds and page faults from the kernel."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import stat
import time
from collections.abc import Callable
from contextlib import suppress
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
        wall=time.perf_counter(),
        cpu=used.ru_utime + used.ru_stime,
        system=used.ru_stime,
        faults=used.ru_minflt,
    )


def usage_of(action: Callable[[], object]) -> Usage:
    """What this process uses while it does something."""
    before = usage()
    action()
    return usage() - before


@dataclass(frozen=True, kw_only=True)
class Holdings:
    """What a process holds that ought not to grow from step to step.

    Attributes:
        resident: bytes of RAM.
        descriptors: open files.
        threads: of the whole process.
        unnamed: bytes on disk of open files that have no name, such as a spill file.
    """

    resident: int
    descriptors: int
    threads: int
    unnamed: int


def holdings() -> Holdings:
    """What this process holds now."""
    descriptors = [int(name) for name in os.listdir("/proc/self/fd")]
    return Holdings(
        resident=resident(),
        descriptors=len(descriptors) - 1,  # one was the listing's own
        threads=_status("Threads"),
        unnamed=sum(map(_unnamed, descriptors)),
    )


def resident() -> int:
    """Bytes of RAM this process occupies now."""
    return _status("VmRSS") * 1024


def peak_resident() -> int:
    """The most bytes of RAM it occupied since `forget_peak`."""
    return _status("VmHWM") * 1024


def forget_peak() -> None:
    """Begin a new peak at what is resident now."""
    _CLEAR_REFS.write_text("5")


def trim_heap() -> None:
    """Have glibc give the free pages of its heap back."""
    ctypes.CDLL(None).malloc_trim(0)


def _status(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+)", _STATUS.read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1])


def _unnamed(descriptor: int) -> int:
    with suppress(OSError):  # closed by now
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 0:
            return status.st_blocks * 512
    return 0
