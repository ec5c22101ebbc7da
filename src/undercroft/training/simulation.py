"""What a recorded training step would hold and how long it would wait, if some of its storages were spilled.

Answers for the model of the machine: one thread of compute, one disk, one byte budget. It knows no torch,
files, clocks or threads, and does not choose what to spill (`plan` does). Invariant: the bytes held never
exceed the budget; a step that cannot keep to it is reported as infeasible, not as a larger peak.

The rules, which the runtime follows too:

- A storage is held from its pack. One that is not in `spill` is held until it is released.
- A spilled one is queued, and the disk writes the queue in order; it is freed when its write completes. An
  unpack before that forwards it: the write is cancelled, nobody waits, and it stays held until it is released
  or, as below, written after all. A release cancels the write, too.
- The disk serves one operation at a time: demand reads before prefetches before writes. Whatever comes first
  pauses the others, which go on later where they stopped (real transfers pause between chunks).
- Prefetches come one at a time in the order of next unpack, each into free room only. They begin from the
  first unpack of a backward pass to the next pack; forward passes do not prefetch.
- A pack or an unpack that finds no room first drops clean storages that nobody uses, the one needed last
  first (a prefetch under way counts); then waits for writes, oldest first; then queues again the writes that
  forwarding had cancelled, the one needed last first. While it waits nothing is prefetched. If none of this
  gives room, the step is infeasible.
- A clean storage is dropped at the end of its last use, and kept until room is needed if more uses follow.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from undercroft.errors import InvalidInput
from undercroft.training.step import END, PACK, UNPACK, Action, StepTrace, actions_by_event


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """How fast the disk is; `latency_seconds` comes on top of each read and each write."""

    read_bytes_per_second: float
    write_bytes_per_second: float
    latency_seconds: float = 0.0

    def __post_init__(self) -> None:
        rates = (self.read_bytes_per_second, self.write_bytes_per_second)
        if not all(0 < rate < math.inf for rate in rates) or not 0 <= self.latency_seconds < math.inf:
            raise InvalidInput(f"a disk has positive, finite rates and no negative latency: {self}")

    def read_seconds(self, nbytes: int) -> float:
        """Seconds to read `nbytes` with the disk to ourselves."""
        return self.latency_seconds + nbytes / self.read_bytes_per_second

    def write_seconds(self, nbytes: int) -> float:
        """Seconds to write `nbytes` with the disk to ourselves."""
        return self.latency_seconds + nbytes / self.write_bytes_per_second


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a simulated step came to; of an infeasible one, up to the moment it failed.

    Attributes:
        feasible: whether the step could keep to its budget.
        peak: the most bytes held at once, at most the budget.
        stall_seconds: how long compute waited, for room and for reads.
        written: bytes of the writes that began.
        read: bytes of the reads that began.
    """

    feasible: bool
    peak: int
    stall_seconds: float
    written: int
    read: int


def simulate(trace: StepTrace, spill: Collection[int], *, budget: int, rates: Rates) -> Outcome:
    """Predict the step that `trace` recorded, with the storages whose indices are in `spill` spilled."""
    return Simulation(Script(trace, rates), spill, budget=budget).outcome()


def live_curve(trace: StepTrace, spill: Collection[int], *, budget: int, rates: Rates) -> tuple[int, ...]:
    """Predict the most bytes held from each event to the next; it ends early where the step is infeasible."""
    simulation = Simulation(Script(trace, rates), spill, budget=budget)
    simulation.outcome()
    return tuple(simulation.curve)


class Script:
    """A trace on a disk, as the simulation reads it; made once, run with many choices of what to spill."""

    def __init__(self, trace: StepTrace, rates: Rates) -> None:
        self.times = trace.times
        self.nbytes = [storage.nbytes for storage in trace.storages]
        self.write_seconds = [rates.write_seconds(nbytes) for nbytes in self.nbytes]
        self.read_seconds = [rates.read_seconds(nbytes) for nbytes in self.nbytes]
        self.unpacks = [(*(unpack for unpack, _ in storage.uses), _NEVER) for storage in trace.storages]
        self.events = actions_by_event(trace)


_NEVER = math.inf
_OUT, _READING, _CLEAN, _DIRTY = range(4)  # only the last three hold bytes; DIRTY bytes are nowhere else


class _GivenUp(Exception):
    pass


class Simulation:
    """One run of a script. Call `outcome` once.

    Args:
        script: the step and the disk.
        spill: indices of the storages to spill.
        budget: bytes that may be held.
        patience: seconds of stall after which to give up and call the step infeasible.

    Attributes:
        curve: the most bytes held from each event to the next, for the events that passed.
    """

    def __init__(
        self, script: Script, spill: Collection[int], *, budget: int, patience: float = math.inf
    ) -> None:
        self.curve: list[int] = []
        self._script, self._spill, self._budget, self._patience = script, spill, budget, patience
        n = len(script.nbytes)
        self._state, self._users, self._unpacked = [_OUT] * n, [0] * n, [0] * n
        self._now = self._stall = 0.0
        self._held = self._high = self._written = self._read = 0
        self._writes: OrderedDict[int, float] = OrderedDict()  # the queue: seconds still to write
        self._forwarded: set[int] = set()  # spilled, but an unpack cancelled the write
        self._reading, self._read_left = -1, 0.0
        self._prefetching = False
        self._away: list[tuple[float, int]] = []  # heap, soonest use first; stale entries are skipped
        self._idle: list[tuple[float, int]] = []  # heap, furthest use first; stale entries are skipped

    def outcome(self) -> Outcome:
        """Run the step."""
        feasible = True
        try:
            for event, actions in enumerate(self._script.events):
                self._pass(event, actions)
        except _GivenUp:
            feasible = False
        self.curve.append(self._high)
        return Outcome(
            feasible=feasible,
            peak=max(self.curve),
            stall_seconds=self._stall,
            written=self._written,
            read=self._read,
        )

    def _pass(self, event: int, actions: Sequence[Action]) -> None:
        self._compute_until(self._script.times[event] + self._stall)
        if event:
            self.curve.append(self._high)
            self._high = self._held
        for action, i in actions:
            if action == PACK:
                self._pack(i)
            elif action == UNPACK:
                self._unpack(i)
            elif action == END:
                self._end(i)
            else:
                self._release(i)
        self._prefetch()

    # The step.

    def _pack(self, i: int) -> None:
        self._prefetching = False
        self._make_room(i)
        self._hold(i)
        self._state[i] = _DIRTY
        if i in self._spill:
            self._writes[i] = self._script.write_seconds[i]

    def _unpack(self, i: int) -> None:
        self._users[i] += 1
        self._unpacked[i] += 1
        state = self._state[i]
        if state == _DIRTY and i in self._writes:
            self._cancel_write(i)
            self._forwarded.add(i)
        elif state == _READING:
            self._reading = -1
            self._wait(self._read_left)
            self._state[i] = _CLEAN
        elif state == _OUT:
            self._make_room(i)
            self._begin_read(i)
            self._wait(self._script.read_seconds[i])
            self._state[i] = _CLEAN
        self._prefetching = True

    def _end(self, i: int) -> None:
        self._users[i] -= 1
        if not self._users[i] and self._state[i] == _CLEAN:
            if self._next_use(i) == _NEVER:
                self._free(i)
            else:
                heappush(self._idle, (-self._next_use(i), i))

    def _release(self, i: int) -> None:
        if i in self._writes:
            self._cancel_write(i)
        self._forwarded.discard(i)
        if self._state[i] != _OUT:
            self._free(i)

    def _wait(self, seconds: float) -> None:
        self._now += seconds
        self._stall += seconds
        if self._stall > self._patience:
            raise _GivenUp

    # Room.

    def _make_room(self, i: int) -> None:
        while self._held + self._script.nbytes[i] > self._budget:
            if not self._drop():
                self._await_write()

    def _hold(self, i: int) -> None:
        self._held += self._script.nbytes[i]
        if self._held > self._high:
            self._high = self._held

    def _free(self, i: int) -> None:
        self._held -= self._script.nbytes[i]
        self._state[i] = _OUT

    def _leave(self, i: int) -> None:
        self._free(i)
        if self._next_use(i) != _NEVER:
            heappush(self._away, (self._next_use(i), i))

    def _drop(self) -> bool:
        while self._idle:
            use, i = heappop(self._idle)
            if self._state[i] in (_READING, _CLEAN) and self._next_use(i) == -use:
                if self._state[i] == _READING:
                    self._reading = -1
                self._leave(i)
                return True
        return False

    def _await_write(self) -> None:
        if not self._writes:
            self._requeue()
        i, seconds = next(iter(self._writes.items()))
        self._wait(seconds)
        self._complete_write(i)

    def _requeue(self) -> None:
        idle = [(self._next_use(i), i) for i in self._forwarded if not self._users[i]]
        if not idle:
            raise _GivenUp
        _, i = max(idle)
        self._forwarded.remove(i)
        self._writes[i] = self._script.write_seconds[i]

    def _next_use(self, i: int) -> float:
        return self._script.unpacks[i][self._unpacked[i]]

    # The disk.

    def _compute_until(self, then: float) -> None:
        while self._now < then and (self._reading >= 0 or self._writes):
            if self._reading >= 0:
                self._read_on(then)
            else:
                self._write_on(then)
            self._prefetch()
        self._now = then

    def _read_on(self, then: float) -> None:
        if self._now + self._read_left > then:
            self._read_left -= then - self._now
            self._now = then
        else:
            self._now += self._read_left
            self._state[self._reading] = _CLEAN
            self._reading = -1

    def _write_on(self, then: float) -> None:
        i, seconds = next(iter(self._writes.items()))
        if self._now + seconds > then:
            self._writes[i] = seconds - (then - self._now)
            self._now = then
        else:
            self._now += seconds
            self._complete_write(i)

    def _complete_write(self, i: int) -> None:
        del self._writes[i]
        self._written += self._script.nbytes[i]
        self._leave(i)

    def _cancel_write(self, i: int) -> None:
        has_begun = self._writes.pop(i) < self._script.write_seconds[i]
        self._written += self._script.nbytes[i] if has_begun else 0

    def _prefetch(self) -> None:
        while self._prefetching and self._reading < 0 and self._away:
            use, i = self._away[0]
            if self._state[i] == _OUT and self._next_use(i) == use:
                if self._held + self._script.nbytes[i] > self._budget:
                    return
                self._state[i] = _READING
                self._reading, self._read_left = i, self._script.read_seconds[i]
                self._begin_read(i)
                heappush(self._idle, (-use, i))
            heappop(self._away)

    def _begin_read(self, i: int) -> None:
        self._hold(i)
        self._read += self._script.nbytes[i]
