"""What happened, and when: a bounded record of events, counters, and a trace that Perfetto opens.

It knows names, lanes, times and bytes; nothing of tensors, disks or models. Invariants: a recorder never
holds more than `capacity` events (the oldest go first and are counted), counters never fall, and recording
from any thread is safe.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from undercroft.errors import InvalidInput

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened.

    Attributes:
        name: what happened, such as "write".
        lane: where it happened, such as "disk": one row of the trace.
        start: seconds on the recorder's clock.
        seconds: how long it took; 0 marks an instant.
        nbytes: bytes it moved, 0 where none.
        detail: anything a reader of the trace may want to know.
    """

    name: str
    lane: str
    start: float
    seconds: float = 0.0
    nbytes: int = 0
    detail: str = ""


class Recorder:
    """Collects events and counters of one object, such as one spill.

    Counters always count. Events are kept only while `enabled`; a disabled recorder costs one test per call.
    """

    def __init__(
        self, *, capacity: int = 65_536, enabled: bool = True, clock: Clock = time.perf_counter
    ) -> None:
        if capacity < 1:
            raise InvalidInput(f"a recorder of {capacity} events holds nothing; use enabled=False instead")
        self.enabled = enabled
        self._clock = clock
        self._lock = threading.Lock()
        self._events: deque[Event] = deque(maxlen=capacity)
        self._forgotten = 0
        self._counters: dict[str, float] = {}

    @property
    def events(self) -> tuple[Event, ...]:
        """The events kept, in the order in which they were recorded (a span is recorded at its end)."""
        with self._lock:
            return tuple(self._events)

    @property
    def forgotten(self) -> int:
        """How many events gave way to newer ones."""
        return self._forgotten

    @property
    def counters(self) -> dict[str, float]:
        """A copy of all counters by name."""
        with self._lock:
            return dict(self._counters)

    def now(self) -> float:
        """Seconds on the recorder's clock."""
        return self._clock()

    def count(self, name: str, amount: float = 1) -> None:
        """Raise a counter; `amount` must not be negative."""
        if amount < 0:
            raise InvalidInput(f"counter {name!r} cannot fall by {-amount}")
        with self._lock:
            self._counters[name] = self._counters.get(name, 0) + amount

    def record(
        self,
        name: str,
        lane: str,
        *,
        start: float | None = None,
        seconds: float = 0.0,
        nbytes: int = 0,
        detail: str = "",
    ) -> None:
        """Keep one event; without `start` it is an instant that happens now."""
        if not self.enabled:
            return
        begun = self._clock() if start is None else start
        event = Event(name=name, lane=lane, start=begun, seconds=seconds, nbytes=nbytes, detail=detail)
        with self._lock:
            self._forgotten += len(self._events) == self._events.maxlen
            self._events.append(event)

    @contextmanager
    def span(self, name: str, lane: str, *, nbytes: int = 0, detail: str = "") -> Generator[None]:
        """Record the enclosed block as one event, also when it raises."""
        if not self.enabled:
            yield
            return
        start = self._clock()
        try:
            yield
        finally:
            self.record(name, lane, start=start, seconds=self._clock() - start, nbytes=nbytes, detail=detail)

    def write_chrome_trace(self, path: str | os.PathLike[str]) -> None:
        """Write the events as Chrome-trace JSON, which ui.perfetto.dev and chrome://tracing open.

        Raises:
            OSError: the file cannot be written.
        """
        trace = {"traceEvents": _trace_events(self.events), "displayTimeUnit": "ms"}
        Path(path).write_text(json.dumps(trace), encoding="utf-8")


def _trace_events(events: tuple[Event, ...]) -> list[dict[str, Any]]:
    origin = min((event.start for event in events), default=0.0)
    rows = _rows(events)
    numbers = {row: number for number, row in enumerate(sorted(set(rows)), start=1)}
    names = [_trace_name(row, number) for row, number in numbers.items()]
    return names + [_trace_event(e, numbers[row], origin) for e, row in zip(events, rows, strict=True)]


def _rows(events: tuple[Event, ...]) -> list[str]:
    """The row of each event: its lane, or "lane 2", "lane 3" where it overlaps another one of its lane.

    The trace format knows only nested events in one row; two reads in flight at once are not nested.
    """
    free_from: dict[str, float] = {}
    rows = [""] * len(events)
    for index in sorted(range(len(events)), key=lambda i: events[i].start):
        event = events[index]
        row = next(row for row in _row_names(event.lane) if free_from.get(row, event.start) <= event.start)
        free_from[row] = event.start + event.seconds
        rows[index] = row
    return rows


def _row_names(lane: str) -> Iterator[str]:
    yield lane
    yield from (f"{lane} {number}" for number in itertools.count(2))


def _trace_name(row: str, number: int) -> dict[str, Any]:
    return {"ph": "M", "name": "thread_name", "pid": os.getpid(), "tid": number, "args": {"name": row}}


def _trace_event(event: Event, number: int, origin: float) -> dict[str, Any]:
    shape = {"ph": "X", "dur": event.seconds * 1e6} if event.seconds else {"ph": "i", "s": "t"}
    return {
        "name": event.name,
        "pid": os.getpid(),
        "tid": number,
        "ts": (event.start - origin) * 1e6,
        "args": {"nbytes": event.nbytes, "detail": event.detail},
        **shape,
    }
