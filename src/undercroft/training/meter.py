"""What a step costs: seconds, CPU seconds, and memory above what the process holds between steps.

Memory is measured in one step only, because the measurement begins by giving free memory back, which costs
time. On the host it is the growth of resident memory, as the kernel counts its peak; on a GPU, what torch's
allocator says.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from undercroft.store import heap

_UNSETTLED = 2
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_CLEAR_PEAK = "5"  # proc_pid_clear_refs(5): reset the peak resident set size


class Meter:
    """Measures the steps of one run.

    Args:
        device: where the activations are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: list[float] = []
        self._cpu_seconds: list[float] = []
        self.peak_nbytes: int | None = None

    @contextmanager
    def step(self, *, memory: bool = False) -> Generator[None]:
        """Measure the enclosed step; with `memory`, its peak instead of its time."""
        if memory:
            with self._memory():
                yield
            return
        start, cpu = time.perf_counter(), time.process_time()
        yield
        self._seconds.append(time.perf_counter() - start)
        self._cpu_seconds.append(time.process_time() - cpu)

    @property
    def seconds_per_step(self) -> float | None:
        """The median, without the first steps, in which allocations and plans settle."""
        return _median(self._seconds)

    @property
    def cpu_seconds_per_step(self) -> float | None:
        """The same, of all threads together."""
        return _median(self._cpu_seconds)

    @contextmanager
    def _memory(self) -> Generator[None]:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            before = torch.cuda.memory_allocated(self._device)
            yield
            self.peak_nbytes = torch.cuda.max_memory_allocated(self._device) - before
            return
        heap.trim()
        before = _status("VmRSS")
        with suppress(OSError):  # where the kernel refuses, the peak since the start remains, and is larger
            _CLEAR_REFS.write_text(_CLEAR_PEAK)
        yield
        self.peak_nbytes = _status("VmHWM") - before


def _median(values: list[float]) -> float | None:
    settled = values[_UNSETTLED:] or values
    return statistics.median(settled) if settled else None


def _status(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    assert match is not None, f"Linux names {field} in {_STATUS}"
    return int(match[1]) * 1024
