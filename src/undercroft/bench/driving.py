"""Ways to take the forwards of a trace through experts: streamed, reads alone, all in memory, without an engine.

It knows how each way is set up and what a pass through the trace used; it judges nothing. Invariants: all ways take the
same forwards through the same experts; reads bypass the page cache where the file system lets them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from undercroft.bench.process import usage_of
from undercroft.bench.workload import Workload
from undercroft.moe.driven import Driven
from undercroft.moe.forwards import forwards
from undercroft.moe.packed import PackedExperts
from undercroft.store.probe import measure_disk
from undercroft.units import MIB

STREAMED = "streamed"
READS = "its reads alone"
IN_MEMORY = "all in memory"
RESIDENT = "no engine"
DOCTOR = "doctor"
_PROBED = 128 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """What one way used for the whole trace.

    Attributes:
        wall: seconds.
        cpu: seconds, of all threads.
        nbytes: read.
        reading: seconds during which at least one read was in flight.
        hits: experts that were in memory when they were wanted.
        misses: experts that were not.
    """

    wall: float
    cpu: float
    nbytes: int = 0
    reading: float = 0.0
    hits: int = 0
    misses: int = 0

    @property
    def rate(self) -> float:
        """Bytes per second while something was read; 0 where nothing was."""
        return self.nbytes / self.reading if self.reading else 0.0

    @property
    def hit_rate(self) -> float:
        """0 to 1; 1 where nothing had to be served."""
        served = self.hits + self.misses
        return self.hits / served if served else 1.0


@contextmanager
def driving(
    experts: PackedExperts,
    work: Workload,
    *,
    policy: str,
    directory: Path,
) -> Generator[dict[str, Callable[[], Pass]]]:
    """The ways, each ready to take a pass; every expert was read and checked, and multiplied with, once before.

    Args:
        experts: on disk.
        work: what is asked of them.
        policy: which leave first.
        directory: on the disk whose ceiling is measured.
    """
    with ExitStack() as stack:
        steps = list(forwards(work.trace, work.shape.hidden, work.shape.dtype))
        opened = partial(Driven, experts, used=work.trace.used, policy=policy)
        in_memory = stack.enter_context(opened(budget=work.shape.nbytes))
        resident = in_memory.resident()
        streamed = stack.enter_context(opened(budget=work.budget))
        streamed.read(steps)
        _drain(resident.run(steps))
        yield {
            STREAMED: lambda: _pass(streamed, lambda: _drain(streamed.run(steps))),
            READS: lambda: _pass(streamed, lambda: streamed.read(steps)),
            IN_MEMORY: lambda: _pass(in_memory, lambda: _drain(in_memory.run(steps))),
            RESIDENT: lambda: _pass(None, lambda: _drain(resident.run(steps))),
            DOCTOR: lambda: _doctor(directory),
        }


def _drain(outputs: Iterable[Tensor]) -> None:
    deque(outputs, maxlen=0)


def _pass(driven: Driven | None, action: Callable[[], None]) -> Pass:
    before = _so_far(driven)
    used = usage_of(action)
    after = _so_far(driven)
    return Pass(
        wall=used.wall,
        cpu=used.cpu,
        nbytes=after.nbytes - before.nbytes,
        reading=after.reading - before.reading,
        hits=after.hits - before.hits,
        misses=after.misses - before.misses,
    )


def _so_far(driven: Driven | None) -> Pass:
    if driven is None:
        return Pass(wall=0, cpu=0)
    report, rate = driven.engine.report(), driven.queue.rate("read")
    return Pass(
        wall=0,
        cpu=0,
        nbytes=report.read_nbytes,
        reading=report.read_nbytes / rate if rate else 0.0,
        hits=report.hits,
        misses=report.misses,
    )


def _doctor(directory: Path) -> Pass:
    """What `undercroft doctor` finds now, as what is read in a second."""
    return Pass(wall=1.0, cpu=0.0, nbytes=round(measure_disk(directory, nbytes=_PROBED).read), reading=1.0)
